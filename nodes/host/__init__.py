"""The adapter: the only place that touches ComfyUI's internals.

api        the V3 node API, its differences between hosts, wire types
files      the host's folders, metadata for saved files
model      the host's loaded Wan model as a rollout's CausalModel
sampler    the host's guiders, samplers and noises
codec      the host's loaded VAE as a streaming decoder
progress   interrupts, progress bars, previews
"""
