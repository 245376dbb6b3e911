"""The page of runs: one HTML file that tells what was trained, how, and how good it is."""
