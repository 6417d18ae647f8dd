"""Fault injection: every operation of a chunk fails once, and what is left has to go on to the bits of the whole.

injector       fails the n-th torch operation
pairs          combinations of which every allowed pair of values is in one
combinations   of anchor, storage, absorption phase, transition and blocks: the rollout that each one is
trial          one chunk of a combination: fail, look, go on, compare
sweep          all of it in several processes, kept as it comes, and its table: python3 run.py faults
"""
