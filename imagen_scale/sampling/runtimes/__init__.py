"""What computes a U-Net while sampling: torch, and the graphs and engines of exports."""
