"""Which layers a drafter may tap (`target_layer_ids`: i is the output of layer i, -1 the embedding's)."""

from __future__ import annotations

from dspark_stream.errors import ModelLoadError


def checked_taps(tap_layers: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """The same, of a target of so many layers. The last is never tapped: libraries return it after the final norm.

    Raises:
        ModelLoadError: a layer that this target does not have, or its last one.
    """
    for layer in tap_layers:
        if not -1 <= layer < layers - 1:
            raise ModelLoadError(
                f"target_layer_ids names layer {layer}; this target allows -1 … {layers - 2}", param="target_layer_ids"
            )
    return tap_layers
