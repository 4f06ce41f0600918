"""Virtio over PCI as the device sees it (VIRTIO 1.4, 4.1): a function made from a declaration.

* `declaration`, `flavours`, `capabilities`: what the function says about itself, as data that can be changed.
* `configspace`, `msix`, `common`, `legacy`, `regions`: its parts, each a few registers.
* `function`: `VirtioPci`, which puts them over a `RegisterBank`.
* `interface`: what a carrier needs of it.
"""
