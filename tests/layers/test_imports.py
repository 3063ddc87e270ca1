"""The layers stand on torch and motif_kernels alone."""

from helpers.python_process import run_python


def test_layers_work_where_transformers_cannot_be_imported():
    out = run_python(
        """
        import importlib.abc, sys
        import torch  # from 2.15 on it looks for triton itself

        class Block(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.split(".")[0] in ("transformers", "triton"):
                    raise ImportError(f"{name} is blocked")

        sys.meta_path.insert(0, Block())
        import motif_kernels
        from motifarch.layers import GroupedDifferentialAttention, PolyNormMLP, RotaryEmbedding

        layer = GroupedDifferentialAttention(
            32, num_heads=5, num_noise_heads=1, num_kv_heads=2, head_dim=8, layer_idx=0
        )
        x = torch.randn(2, 7, 32)
        y = PolyNormMLP(32, intermediate_size=48)(layer(x, RotaryEmbedding(8)(torch.arange(7)[None])))
        y.sum().backward()
        print(tuple(y.shape), bool(torch.isfinite(y).all()))
        """
    )
    assert out.strip() == "(2, 7, 32) True"
