"""Many videos on many GPUs, by Ray: `python3 run.py fleet`, docs/fleet.md. It talks to ComfyUI over HTTP as any client does; the
pack itself knows nothing of it, and it runs in an environment of its own."""
