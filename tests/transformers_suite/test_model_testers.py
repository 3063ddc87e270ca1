"""transformers' own model tests on a small model of each attention type."""

import importlib
import unittest
from typing import ClassVar

import pytest
import torch
from transformers import set_seed
from transformers.models.auto import modeling_auto
from transformers.testing_utils import _TEXT_MODEL_TESTER_DEFAULTS as DEFAULTS

from helpers import transformers_tests
from motifarch.models import motif

transformers_tests.prepare()
common, parallel, pipelines, training = (
    importlib.import_module(f"tests.test_{name}")
    for name in ("modeling_common", "tensor_parallel_mixin", "pipeline_mixin", "training_mixin")
)

pytestmark = pytest.mark.slow

# As if the models were transformers' own: which labels a class takes is looked up by its name, and
# tests on several ranks are for the models that are listed.
parallel.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
for task, model_class in {
    "": motif.MotifModel,
    "_FOR_CAUSAL_LM": motif.MotifForCausalLM,
    "_FOR_SEQUENCE_CLASSIFICATION": motif.MotifForSequenceClassification,
    "_FOR_TOKEN_CLASSIFICATION": motif.MotifForTokenClassification,
    "_FOR_QUESTION_ANSWERING": motif.MotifForQuestionAnswering,
}.items():
    getattr(modeling_auto, f"MODEL{task}_MAPPING_NAMES")["Motif"] = model_class.__name__


if transformers_tests.CHECKOUT:
    _causal = importlib.import_module("tests.causal_lm_tester")
    Tester, Tests = _causal.CausalLMModelTester, _causal.CausalLMModelTest
else:

    class Tester:
        """What tests ask for besides the variants' own: sizes, inputs, classes."""

        def __init__(self, parent):
            vars(self).update(DEFAULTS)
            heads = ("causal_lm", "sequence_classification", "token_classification", "question_answering")
            self.all_model_classes = [self.base_model_class, *(getattr(self, f"{head}_class") for head in heads)]

        def get_config(self):
            fields = (name for name in self.config_class.__dataclass_fields__ if hasattr(self, name))
            return self.config_class(**{name: getattr(self, name) for name in fields})

        def prepare_config_and_inputs_for_common(self):
            ids = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
            return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}

    class Tests(
        common.ModelTesterMixin,
        common.GenerationTesterMixin,  # empty, but asked for
        parallel.TensorParallelTesterMixin,
        pipelines.PipelineTesterMixin,
        training.TrainingTesterMixin,
    ):
        def setUp(self):
            self.model_tester = self.model_tester_class(self)
            self.all_model_classes = self.model_tester.all_model_classes
            self.pipeline_model_mapping = {"text-generation": motif.MotifForCausalLM}


class MotifTester(Tester):
    base_model_class = motif.MotifModel
    config_class = motif.MotifConfig
    causal_lm_class = motif.MotifForCausalLM
    sequence_classification_class = motif.MotifForSequenceClassification
    token_classification_class = motif.MotifForTokenClassification
    question_answering_class = motif.MotifForQuestionAnswering
    variant: ClassVar[dict] = {}

    def __init__(self, parent):
        super().__init__(parent)
        plain = {"hidden_act": "poly_norm", "head_dim": 8, "num_labels": 3}
        # DEFAULTS are of models with experts too.
        plain |= {"num_experts": None, "moe_intermediate_size": None}
        vars(self).update(plain | self.variant)


class MotifTests(Tests):
    model_tester = None

    def setUp(self):
        """Draws the same inputs and weights in each run."""
        common.global_rng.seed(0)
        set_seed(0)
        super().setUp()

    @unittest.skip("attn_implementation is 'auto' by default, which is not one of transformers' names")
    def test_sdpa_can_dispatch_non_composite_models(self):
        pass

    @unittest.skip("rope_type 'dynamic' is refused by name: its frequencies change with the length, cached keys do not")
    def test_model_rope_scaling_from_config_1_dynamic(self):
        pass

    def _get_attention_shape(self, batch_size, seq_length, config):
        """Keys of a pair lie side by side, as wide as a value."""
        heads, width = config.num_key_value_heads, config.v_head_dim
        shape = (batch_size, heads // 2 if config.has_paired_kv else heads, seq_length, width)
        return shape, shape


def variant(kind, *, heads, noise_heads, kv_heads):
    """A model tester."""
    fields = {"attention_type": kind, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return type("Variant", (MotifTester,), {"variant": fields | {"num_noise_heads": noise_heads}})


class TestGDA(MotifTests, unittest.TestCase):
    model_tester_class = variant("gda", heads=6, noise_heads=2, kv_heads=4)


class TestDiffV1(MotifTests, unittest.TestCase):
    model_tester_class = variant("diff_v1", heads=4, noise_heads=2, kv_heads=4)


class TestDiffV2(MotifTests, unittest.TestCase):
    model_tester_class = variant("diff_v2", heads=6, noise_heads=2, kv_heads=2)


class TestSoftmax(MotifTests, unittest.TestCase):
    model_tester_class = variant("softmax", heads=4, noise_heads=None, kv_heads=2)

    @unittest.skip(
        "a random model's greedy tokens part by chance: a shard is rounded to 8 bits on scales of its own, as near to "
        "the weights as the whole tensor is on its"
    )
    def test_tp_generation_quantized(self):
        pass


class Motif3Tester(MotifTester):
    """Full layers and a window, dense layers and experts, hyper-connections, one more token."""

    variant: ClassVar[dict] = {
        "attention_type": "gdla",
        "num_attention_heads": 6,
        "num_noise_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "q_lora_rank": 16,
        "kv_lora_rank": 10,
        "attention_gate": True,
        "num_experts": 4,
        "experts_top_k": 2,
        "moe_intermediate_size": 16,
        "n_dense_first_layers": 1,
        "polynorm_sigmoid_weight": True,
        "polynorm_output_scale": 0.5,
        "mhc_enabled": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "sliding_window_period": 2,
        "num_nextn_predict_layers": 1,
        "initializer_range": 0.2,  # with 0.02 latents are near 0, and positions change nothing
    }

    def prepare_config_and_inputs_for_common(self):
        """Padded on the left: a cached window would keep padding on the right, which is refused."""
        config, inputs = super().prepare_config_and_inputs_for_common()
        return config, inputs | {"attention_mask": inputs["attention_mask"].flip(-1)}


class TestMotif3(MotifTests, unittest.TestCase):
    model_tester_class = Motif3Tester

    @unittest.skip("rope_type 'linear' is refused by name: with latent attention there is YaRN, or no scaling")
    def test_model_rope_scaling_from_config_0_linear(self):
        pass

    @unittest.skip("with latent attention a query sees sliding_window keys and its own, as Motif-3 counts")
    def test_sliding_window_mask(self):
        pass

    def test_load_with_mismatched_shapes(self):
        """A head's folder has no layer for multi-token prediction; the tester's config loads it."""
        self.model_tester.num_nextn_predict_layers = 0
        super().test_load_with_mismatched_shapes()

    def test_hidden_states_output(self):
        """Layers' inputs have a dimension of streams, as those of transformers' DeepSeek-V4."""
        self.model_tester.encoder_seq_length = self.model_tester.get_config().mhc_expansion_rate
        super().test_hidden_states_output()

    def _check_hidden_states_for_generate(self, batch_size, hidden_states, *args, **kwargs):
        first_streams = tuple(tuple(x[:, :, 0] if x.dim() == 4 else x for x in step) for step in hidden_states)
        super()._check_hidden_states_for_generate(batch_size, first_streams, *args, **kwargs)

    def _check_attentions_for_generate(self, batch_size, attentions, *, config, **kwargs):
        """Those of full layers: the tester takes every layer to keep all keys."""
        full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
        attentions = tuple(tuple(step[i] for i in full) for step in attentions)
        super()._check_attentions_for_generate(batch_size, attentions, config=config, **kwargs)

    def _check_past_key_values_for_generate(self, batch_size, past_key_values, seq_length, config):
        """A full layer keeps latents and rotary parts, a window its last keys and values."""
        latent = (batch_size, 1, seq_length, config.kv_lora_rank + config.qk_rope_head_dim)
        for kind, layer in zip(config.layer_types, past_key_values.layers, strict=True):
            if kind == "full_attention":
                assert layer.keys.shape == latent
            else:
                kept = layer.keys.shape[2]
                assert kept <= config.sliding_window + 1
                heads = (batch_size, config.num_key_value_heads, kept)
                assert layer.keys.shape == (*heads, config.head_dim)
                assert layer.values.shape == (*heads, config.v_head_dim)


def without_streams(test):
    """A test on a model without hyper-connections: transformers cuts the hidden states of drafted
    tokens along the last dimension but one, which would be the streams'.
    """

    def run(self):
        self.model_tester.mhc_enabled = False
        test(self)

    return run


def with_all_experts(test):
    """A test in which each token takes every expert: rounding to 16 bits chooses none."""

    def run(self):
        self.model_tester.experts_top_k = self.model_tester.num_experts
        test(self)

    return run


for name in [name for name in dir(TestMotif3) if getattr(TestMotif3, name)]:
    inherited = getattr(TestMotif3, name)
    if name.startswith("test_assisted_decoding"):
        setattr(TestMotif3, name, without_streams(inherited))
    if name.startswith("test_eager_matches_sdpa_inference") and "fp32" not in name:
        setattr(TestMotif3, name, with_all_experts(inherited))
for name in [name for name in dir(TestMotif3) if name.startswith("test_tp_")]:
    reason = "tensor parallelism is refused: latent attention, experts and hyper-connections are not cut"
    setattr(TestMotif3, name, unittest.skip(reason)(lambda _: None))

del Tester, Tests, MotifTests  # pytest would take them for tests
