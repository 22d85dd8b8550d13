"""Imported once by the fork server: all that a training process imports, and DeepSpeed's operators.

It starts no threads and joins nothing.
"""

import functools

import cpuinfo

from imagen_scale.training import operators

for operator in operators.operators():
    operators.build(operator, lambda sentence: None)  # where it is built already, only loaded

# DeepSpeed's Adam asks it for the processor's vendor, through a process that takes a second.
cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
cpuinfo.get_cpu_info()
