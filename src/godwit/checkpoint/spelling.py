"""Canonical names for the tensors of the text model."""

from __future__ import annotations

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

#: Parts of multimodal checkpoints that are not the text model.
_TOWERS = (
    "visual.",
    "vision_tower.",
    "vision_model.",
    "vision_embed_tokens.",
    "audio_tower.",
    "multi_modal_projector.",
    "mm_projector.",
    "image_newline",
)
_WRAPPERS = ("model.language_model.", "language_model.model.", "language_model.")
#: Top-level parts, which some wrappers put under their prefix.
_TOP = ("lm_head.", "mtp.")
#: Parts that have no prefix in checkpoints of the decoder alone.
_BARE = ("embed_tokens.", "layers.", "norm.")


def canonical_name(name: str) -> str | None:
    """The canonical form of a published name; None for tensors that are not part of the text model.

    Multimodal wrappers have the text model under ``model.language_model.`` or ``language_model.model.``, next
    to their towers and projectors, and the head at the top or under ``language_model.``; some converters
    write ``model.mtp.``; a checkpoint of the decoder alone has no prefix.
    """
    if name.removeprefix("model.").startswith(_TOWERS) or name.endswith(".rotary_emb.inv_freq"):
        return None
    prefix = next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), None)
    inner = name.removeprefix(prefix or "model.")
    if inner.startswith(_TOP):
        return inner
    if prefix or inner.startswith(_BARE):
        return "model." + inner
    return name
