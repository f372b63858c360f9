#!/bin/bash
# Selection and training on two machines of eight GPUs: sbatch examples/slurm.sh
#SBATCH --job-name=bpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
set -euo pipefail

# A disk that both machines see. A job that was cut off goes on from what is there.
store=${STORE:-$SCRATCH/gradients}
output=${OUTPUT:-$SCRATCH/selection}

# A task for each GPU: srun tells each which of them it is, and bpo tells torch.distributed.
srun --kill-on-bad-exit=0 python -m bpo select "$MODEL" "$DATA" --budget 5000 --store "$store" --output "$output"

# TRL trains on what was selected, started as usual.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --ntasks-per-node=1 bash -c "accelerate launch --config_file examples/accelerate.yaml \
  --machine_rank \$SLURM_NODEID --main_process_ip $head --main_process_port 29500 \
  -m trl.scripts.dpo --model_name_or_path $MODEL --dataset_name $output/dataset --output_dir $output/trained"
