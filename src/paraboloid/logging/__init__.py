"""Quantities as numbers for a logger (`scalars`, TensorBoard, Lightning); imports from `noise` and below.

`TensorBoard` and `LightningCallback` need the extras `paraboloid[tensorboard]` and `paraboloid[lightning]`; neither
package is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paraboloid.logging.layer_scalars import scalars
from paraboloid.logging.tensorboard import TensorBoard

if TYPE_CHECKING:
    from paraboloid.logging.lightning import LightningCallback

__all__ = ["LightningCallback", "TensorBoard", "scalars"]


def __getattr__(name: str) -> Any:
    if name == "LightningCallback":  # a subclass of Lightning's own class, so that defining it imports Lightning
        from paraboloid.logging.lightning import LightningCallback

        return LightningCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; expected one of {__all__}.")
