"""Long causal video rollouts at constant memory, in plain PyTorch. Knows nothing of ComfyUI. What it computes: docs/semantics.md.

rollout         the recurrence alone: draw, denoise, commit, emit
transitions     what a change of the prompt, or a restart, does to the past
passes          one forward of the model over the past, noisy or clean
past            all that a chunk leaves behind, as one thing with one owner and one transaction
spec            what a rollout is, before anything is allocated; rollout_state: what it is between two chunks
geometry        the shapes of latents and models; bounds: how far numbers may go; families/: what differs by model family
anchors         the policies of what is looked back to beyond the window, and what they may do to a layer
rope            rotary embedding of Wan, and where in time a cached frame stands
cache/          where keys and values lie: byte_plan, slots, enter_leave, rotated, stored, deep, deep_choice (which tokens)
attention/      cached (what a model's layers call during a pass), wan (its forwards)
absorption/     layers whose history becomes a closed-form correction (ISPA); lse: attention in parts, merged exactly
schedules/      noise levels, samplers, noise by (seed, chunk, step); rolling: chunks denoised together
prompts/        timelines as people write them, the plan by frame, blends of embeddings; steered: changed while a video is made
decode/         streaming decoders: Wan's VAE, the tiny VAE
audio/          track (a sound, and what an encoder made of it), resampling (at the times of video frames), placed (in a file)
video/          sink (a video that grows), frame_folder, enlarging (between decoder and files), join, tail, frames (read), colour;
                sound_track and sound_beside (what they carry), sound_file (read)
states/         a state on disk, its checks, those that are kept on the way
weights/        checkpoints, LoRAs, presets and their files
files/          the one way in which a file is written, tensors with checksums, headers
measure/        metrics of videos, live meters, comparisons, attention share
extend          what other packs build on
"""
