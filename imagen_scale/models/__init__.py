"""Networks: `nn.Module` only, and the memory techniques applied to a built one."""
