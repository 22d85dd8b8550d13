"""What other trainers left behind, turned into configurations and runs of this one."""
