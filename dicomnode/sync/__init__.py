"""The cloud side: results out by STOW-RS, model bundles in. Everything works without it.

Objects leave as they are, patient identity included, and only when ``cloud.stow_url`` is
set. A model that comes in serves only after its digest and its golden cases were checked
on this box.
"""
