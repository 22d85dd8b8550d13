"""What `imagen-scale doctor` examines: the machine, and the software on it."""
