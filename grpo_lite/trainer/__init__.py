"""The seam to TRL: one subclass of GRPOTrainer (`trainer.py`), one of SFTTrainer (`warmup.py`), and their parts.

Other rooms use `trainer.PackedGRPOTrainer`, `warmup.WarmupTrainer`, and `unsloth.unsloth_trainer` for the backend
unsloth. All have a `journal` and `faults`. `INTERNALS` lists what each part reads and writes of TRL's and transformers'
trainers, as read in trl 1.14.0 and 1.16.0; `tests/trainer/test_contract.py` compares it with the code and the installed
version.
"""

# Part -> the attributes and methods of GRPOTrainer (warmup: SFTTrainer) that it uses. Names that it writes end in "=".
INTERNALS: dict[str, str] = {
    "trainer": "_load_from_checkpoint accelerator args aux_loss_enabled= model state= use_vllm",
    "support": "accelerator args generation_config max_completion_length model temperature "
    "use_transformers_continuous_batching use_vllm",
    "refill": "_buffered_inputs= _generate_and_score_completions _get_train_sampler _logs= _metrics= _step= "
    "_tokenizer _train_batch_size args model multi_objective_aggregation num_generations num_iterations "
    "scale_rewards shuffle_dataset state train_dataset",
    "replay": "_metrics _tokenizer args model multi_objective_aggregation num_generations scale_rewards state",
    "early": "_tokenizer environment_factories processing_class reward_funcs state tools",
    "rollouts": "_batch_environments _env_tools _is_vlm accelerator args chat_template chat_template_kwargs "
    "environment_factories generation_config max_completion_length model num_iterations processing_class state "
    "temperature tools use_vllm",
    "episodes": "_async_tool_dicts= _environment_pool _metrics _sync_tool_dicts= environment_factories= environments "
    "model",
    "gradients": "_compute_loss _entropy_bonus_enabled _entropy_window_stats= _last_world_entropy= _metrics= "
    "accelerator args aux_loss_enabled beta entropy_coef= model temperature top_entropy_quantile",
    "finite": "_metrics accelerator add_callback args model num_generations reward_funcs reward_weights state",
    "recovery": "_entropy_window_stats= _last_world_entropy= _metrics _step accelerator args beta compute_loss "
    "compute_loss_context_manager entropy_coef= max_completion_length model num_generations optimizer "
    "state",
    "parallel": "accelerator= args model num_generations top_entropy_quantile",
    "state": "_buffered_inputs= _entropy_window_stats= _logs _metrics _step= _tr_loss= accelerator args "
    "num_iterations state",
    "journal": "_log_completion_extra _logs _metrics _tokenizer model reward_func_names reward_weights state",
    "unsloth": "",
    "warmup": "_metrics= _prepare_inputs _total_train_tokens= accelerator add_callback args compute_loss "
    "compute_loss_context_manager data_collator model state train_dataset",
}
