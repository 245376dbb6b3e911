"""Input that somebody made in order to do harm, of every kind that the program takes."""
