"""ComfyUI-AdaState: long causal video at constant memory. ComfyUI finds `comfy_entrypoint` here."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension; imports wait until the host asks, so that the package can be read without a host."""
    from .nodes import AdaStateExtension

    return AdaStateExtension()
