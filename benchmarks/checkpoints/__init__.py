"""What a checkpoint costs: time that training waits, transfer, memory."""
