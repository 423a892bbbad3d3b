"""A recipe: one YAML file that is one whole run. `load` reads it, `recipe` holds it, `schedule` counts its steps.

Other rooms use `recipe.Recipe`, `load.load_recipe` and `schedule`; nothing here imports torch.
"""
