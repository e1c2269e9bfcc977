"""Units in, units out: what a robot sends to what the model takes, and the model's chunk to the robot's actions."""
