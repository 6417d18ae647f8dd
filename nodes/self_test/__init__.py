"""A test for every card: small rollouts and decodes on the host's own device, held to what they must give.

outcome          ok, differs, failed; and how checks are run one after the other
bench            what the checks share: the models, a rollout's request, its plain twin on the CPU
kernel_checks    attention, rotation and 8-bit numbers alone, so that a fault has a name
rollout_checks   every preset; stop and resume, interrupt, storages, absorption, the demo
other_checks     decoders against the host's, one exact block of 1.3B
all_checks       the list
versions         what the table says of host and card
"""
