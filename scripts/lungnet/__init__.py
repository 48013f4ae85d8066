"""Training of ct-lung-unet: procedural chests (``phantoms``), slabs (``slabs``), the network (``network``)."""
