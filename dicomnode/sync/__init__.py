"""The cloud side: results and records out, model bundles in. Everything works without it.

What leaves is de-identified unless its rules say otherwise, and only when ``cloud.stow_url`` is
set. A model that comes in serves only after its digest and its golden cases were checked
on this box.
"""
