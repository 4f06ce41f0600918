"""Constants and clause texts of VIRTIO 1.4, and nothing else: no behaviour, no import of ours.

`ids` device and PCI ids, `features` the device-independent feature bits, `status` the device status bits,
`clauses` short texts of the clauses we cite, `pci` and `mmio` the register layouts.
"""
