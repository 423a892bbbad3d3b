"""The seam to TRL: one subclass of GRPOTrainer and the parts it delegates to.

Other rooms use `trainer.PackedGRPOTrainer` and `sealed.sealed`; what is read of TRL's internals is tested in
`tests/trainer/test_contract.py`.
"""
