"""Split one matrix, W = Q + B A, and print its error with and without the components B A.

python examples/split_one_matrix.py    (qsvd quantize does this for every weight of a checkpoint)
"""

import torch

import qsvd

weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))  # [out features, in features]
weight[:, ::100] *= 8  # outlier columns, as language models have them
split = qsvd.split_weight(weight, qsvd.Recipe(qsvd.NormalFloat4(double_quant=True), rank=16))
error = qsvd.measure(weight, split, name="example", role="other")
print(f"{error.bits:.2f} bits per weight at rank {split.rank}")
print(f"relative error {error.before.frobenius / error.weight_frobenius:.4f} without the components")
print(f"relative error {error.after.frobenius / error.weight_frobenius:.4f} with them")
