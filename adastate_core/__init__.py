"""Long causal video rollouts at constant memory, in plain PyTorch. Knows nothing of ComfyUI.

rope            rotary embedding of Wan, and where in time a cached frame stands
cache_plan      the plan of a cache: frozen, knows its bytes
layer_slots     which frame lies where in a layer's cache, and how attention reads them
kv_cache        the buffers of one run
kv_storage      the same in 8 bits or in host memory, expanded layer by layer
attention_lse   attention in parts with log-sum-exps, and their exact merge
absorption/     layers whose history becomes a closed-form correction (ISPA)
attention       what a model's attention layers call during a pass
anchors         what the anchor slots of the cache hold: none, static, ema, adaptive
schedule        sigmas, re-noising, noise by (seed, chunk, step)
timeline        prompts over time as people write them (timeline_format writes them back)
prompts         the same as a value on a wire, and blends of two embeddings
rollout         the recurrence: a generator of chunks over an immutable state
rollout_file    that state on disk
vae_stream      causal VAE decode that carries its cache between calls
taehv_stream    the same for the tiny VAE (TAEHV)
video_sink      frames to a file as they come
video_colour    RGB of a frame by its own tags, and frames in a matrix
"""
