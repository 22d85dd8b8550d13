"""Training of one stage at a time under DeepSpeed; the only importer of deepspeed."""
