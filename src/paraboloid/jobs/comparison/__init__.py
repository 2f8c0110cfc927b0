"""Two reports side by side, from what they wrote: `paraboloid compare A B`."""

from paraboloid.jobs.comparison.comparison import compare, page

__all__ = ["compare", "page"]
