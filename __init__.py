"""ComfyUI entry point of the LongCat-Video pack; the engine is `longcat_core`, the nodes are in `nodes`."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    # Imported here, not above: only ComfyUI calls this, and only there is `comfy` to be had.
    from .nodes.extension import LongCatExtension

    return LongCatExtension()
