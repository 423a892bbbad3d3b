"""Base models: their files, their config, the device that they load on, and loading them with LoRA or Unsloth.

Other rooms use `base.Base`, `load`, `config.read_shape`, `device.detect_device` and `driver.usable_device`.
"""
