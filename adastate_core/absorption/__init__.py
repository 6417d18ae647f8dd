"""ISPA (arXiv 2607.00712): layers whose history is absorbed into a closed-form correction.

settings        what is asked for
moments         streaming statistics of one layer
collector       of many layers over chunks, with rows held out
solve           the correction, its ridge, its residual
absorbed_phases what the cache has allocated before the switch and after it
absorber        one run: collect, switch at once, correct, watch
host_history    what the watched layers lost
saved           all of it in a state and in a file
"""
