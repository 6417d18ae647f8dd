"""The adapter: the only place that touches ComfyUI's internals.

api           the V3 node API, its differences between hosts, wire types; node, sockets: what every node of the pack checks
model         the host's loaded Wan model as a rollout's CausalModel; fusing, feed_forward, pass_memory: its passes made faster
speech_model  the same of a model that hears; made_models, made_speech: random ones, and their plain twins on the CPU
guider        the host's guiders, samplers and noises
codec         the host's loaded VAE as a streaming decoder; fast_vae: its fast way
enlarger      the host's upscale and frame interpolation models, a picture at a time
output_files  the host's folders, metadata for saved files; frame_folders, sound_files, names, listing
text          the host's text encoder
progress      interrupts, progress bars, previews
links         what is linked to what in a prompt that runs; queued: in one that is being queued; rerun: which results are replayed
live_runs     rollouts under way, and who watches them; live_routes, steer_route, timeline_route: the pack's routes
server        the host's server, and whether anybody is shown the prompt under way
"""
