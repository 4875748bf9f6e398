"""Fast implementations of the operations in ``functional``, one package per kind of device."""
