"""DPO on the pairs that bpo selects: a script of TRL's kind, and the two lines that bpo changes in it.

python examples/dpo.py --model_name_or_path my-sft-model --dataset_name my-pairs --budget 0.5 --output_dir out

It takes the options of TRL's ``ScriptArguments``, ``DPOConfig`` and ``ModelConfig``, and those of ``bpo.BPOConfig``.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

import bpo

parser = TrlParser((ScriptArguments, bpo.BPOConfig, ModelConfig))  # bpo: in place of DPOConfig
script, args, model = parser.parse_args_and_config()

data = load_dataset(script.dataset_name, name=script.dataset_config)
trainer = bpo.BPOTrainer(  # bpo: in place of DPOTrainer
    model.model_name_or_path,
    args=args,
    train_dataset=data[script.dataset_train_split],
    eval_dataset=data[script.dataset_test_split] if args.eval_strategy != "no" else None,
    peft_config=get_peft_config(model),
)
trainer.train()
trainer.save_model(args.output_dir)
