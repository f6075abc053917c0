"""Noise schedules: values, parity with diffusers, its JSON files, and files that nobody should have written."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsem.diffusion import STABLE_DIFFUSION, NoiseSchedule, levels, schedule_from_json
from jaxsem.errors import InputError, WeightsError

# As published with Stable Diffusion 1.x.
PNDM = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
DDIM = {"_class_name": "DDIMScheduler"}


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "first", "second", "middle", "last"),
    [
        # Timesteps 0, 1, 500 and 999 of diffusers 0.42.1, in float32.
        (STABLE_DIFFUSION, 0.99915, 0.99829602, 0.27633247, 0.00466009),
        (NoiseSchedule(), 0.99989998, 0.99978006, 0.07779666, 4.03583e-05),
        (NoiseSchedule(beta_schedule="squaredcos_cap_v2"), 0.99995869, 0.99991256, 0.49228504, 2.428735e-09),
        (dataclasses.replace(STABLE_DIFFUSION, rescale_betas_zero_snr=True), 0.99915, 0.9982335, 0.24101864, 0.0),
    ],
)
def test_golden_alpha_bars(schedule, first, second, middle, last):
    bars = schedule.alpha_bars
    assert bars.dtype == np.float32
    np.testing.assert_allclose(bars[[0, 1, 500, 999]], [first, second, middle, last], rtol=2e-5)


def test_trained_betas_are_taken_as_they_are():
    schedule = NoiseSchedule(3, trained_betas=(0.5, 0.5, 1.0))
    np.testing.assert_array_equal(schedule.alpha_bars, [0.5, 0.25, 0.0])


@pytest.mark.parametrize(("to_one", "clean"), [(True, 1.0), (False, 0.5)])
def test_the_clean_level_lies_before_timestep_0(to_one, clean):
    schedule = NoiseSchedule(2, trained_betas=(0.5, 0.5), set_alpha_to_one=to_one)
    alpha, beta = jax.jit(lambda t: levels(schedule, t))(jnp.array([-300, -1, 0, 1]))
    np.testing.assert_array_equal(alpha, [clean, clean, 0.5, 0.25])
    np.testing.assert_array_equal(beta, 1 - alpha)


def test_a_timestep_beyond_the_last_has_no_level():
    assert np.isnan(levels(STABLE_DIFFUSION, jnp.array([999, 1000, 10**6]))).tolist() == [[False, True, True]] * 2


def test_the_noise_of_the_first_timesteps_keeps_its_digits():
    schedule = NoiseSchedule(beta_start=1e-6, beta_end=0.02)
    assert float(levels(schedule, 0)[1]) == pytest.approx(1e-6, rel=1e-6)
    assert float(1 - levels(schedule, 0)[0]) != pytest.approx(1e-6, rel=1e-3)  # what float32 leaves of it


def test_a_schedule_is_static():
    again = pickle.loads(pickle.dumps(dataclasses.replace(STABLE_DIFFUSION)))
    assert (again, hash(again)) == (STABLE_DIFFUSION, hash(STABLE_DIFFUSION))
    assert again != dataclasses.replace(again, steps_offset=0)
    for array in (again.alpha_bars, again.table):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 0


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_published_file(tmp_path):
    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(PNDM))
    assert schedule_from_json(path) == schedule_from_json(str(path)) == schedule_from_json(PNDM) == STABLE_DIFFUSION


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DDIMScheduler", NoiseSchedule()),
        ("DDPMScheduler", NoiseSchedule()),
        ("PNDMScheduler", NoiseSchedule(clip_sample=False)),
        ("DPMSolverMultistepScheduler", NoiseSchedule(clip_sample=False)),
        ("HeunDiscreteScheduler", NoiseSchedule(beta_start=0.00085, beta_end=0.012, clip_sample=False)),
        ("LCMScheduler", dataclasses.replace(STABLE_DIFFUSION, steps_offset=0, set_alpha_to_one=True)),
    ],
)
def test_absent_fields(name, expected):
    assert schedule_from_json({"_class_name": name}) == expected


def test_every_field_is_read():
    fields = {
        "num_train_timesteps": 4,
        "beta_start": 0.1,
        "beta_end": 0.2,
        "beta_schedule": "scaled_linear",
        "trained_betas": [0.1, 0.2, 0.3, 0.4],
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "steps_offset": 2,
        "set_alpha_to_one": False,
        "clip_sample": False,
        "clip_sample_range": 3.5,
        "rescale_betas_zero_snr": True,
    }
    assert {field.name for field in dataclasses.fields(NoiseSchedule)} == fields.keys()
    read = dataclasses.asdict(schedule_from_json({**DDIM, **fields}))
    assert read == {**fields, "trained_betas": (0.1, 0.2, 0.3, 0.4)}
    assert all(value != getattr(NoiseSchedule(), name) for name, value in read.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON file"),
        ("{", "no JSON file"),
        ("\x00\x01", "no JSON file"),
        ("[" * 100_000, "no JSON file"),
        ('{"beta_start": ' + "9" * 5000 + "}", "no JSON file"),
        ("[1, 2]", "holds a list, not a JSON object"),
        ("{}", "has the _class_name None"),
        (json.dumps({**DDIM, "beta_start": float("nan")}), "beta_start is a number above 0 and at most 1, not nan"),
        (json.dumps({**DDIM, "beta_end": float("inf")}), "beta_end .* not inf"),
    ],
)
def test_files_that_are_no_schedule(tmp_path, text, message):
    path = tmp_path / "scheduler_config.json"
    path.write_text(text)
    with pytest.raises(WeightsError, match=message) as caught:
        schedule_from_json(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("name", ["absent.json", ".", "a\0b"])
def test_paths_that_are_no_file(tmp_path, name):
    with pytest.raises(InputError):
        schedule_from_json(f"{tmp_path}/{name}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "'FlowMatchEulerDiscreteScheduler', and the schedulers known",
        ),
        ({"_class_name": ["DDIMScheduler"]}, r"_class_name \['DDIMScheduler'\]"),
        ({"thresholding": True}, "asks for dynamic thresholding of the predictions"),
        ({"thresholding": "yes"}, "asks for dynamic thresholding"),
        ({"use_flow_sigmas": True}, "asks for the noise of a rectified flow"),
        ({"num_train_timesteps": 10**9}, "num_train_timesteps is an integer from 1 to 10000, not 1000000000"),
        ({"num_train_timesteps": -1}, "not -1"),
        ({"num_train_timesteps": 0}, "not 0"),
        ({"num_train_timesteps": True}, "not True"),
        ({"num_train_timesteps": 1000.0}, "not 1000.0"),
        ({"num_train_timesteps": "1000"}, "not '1000'"),
        ({"num_train_timesteps": None}, "not None"),
        ({"num_train_timesteps": 10**5000}, "an? int of very many digits"),
        ({"beta_start": 0}, "beta_start is a number above 0 and at most 1, not 0"),
        ({"beta_start": -0.1}, "not -0.1"),
        ({"beta_start": "0.1"}, "not '0.1'"),
        ({"beta_start": False}, "not False"),
        ({"beta_end": 10**400}, "beta_end"),
        ({"beta_end": 1.5}, "not 1.5"),
        ({"beta_end": {}}, r"not \{\}"),
        ({"beta_schedule": "sigmoid"}, "'linear', 'scaled_linear', 'squaredcos_cap_v2', not 'sigmoid'"),
        ({"beta_schedule": ["linear"]}, r"not \['linear'\]"),
        ({"prediction_type": "flow_prediction"}, "prediction_type is one of 'epsilon', 'sample', 'v_prediction'"),
        ({"prediction_type": 7}, "not 7"),
        ({"timestep_spacing": "karras"}, "'leading', 'trailing', 'linspace', not 'karras'"),
        ({"steps_offset": 1000}, "steps_offset is an integer from 0 to 999, not 1000"),
        ({"steps_offset": -1}, "not -1"),
        ({"set_alpha_to_one": 1}, "set_alpha_to_one is one of False, True, not 1"),
        ({"clip_sample": "false"}, "clip_sample is one of False, True, not 'false'"),
        ({"clip_sample_range": float("inf")}, "clip_sample_range"),
        ({"clip_sample_range": None}, "clip_sample_range"),
        ({"rescale_betas_zero_snr": None}, "rescale_betas_zero_snr"),
        ({"rescale_betas_zero_snr": True, "num_train_timesteps": 1}, "needs 2 of them"),
        ({"trained_betas": "0.1"}, "a tuple of numbers"),
        ({"trained_betas": [0.1, 0.2]}, "holds 2 numbers for 1000 num_train_timesteps"),
        ({"trained_betas": [0.1, float("nan")], "num_train_timesteps": 2}, r"trained_betas\[1\] .* not nan"),
        ({"trained_betas": [0.1, [0.2]], "num_train_timesteps": 2}, r"trained_betas\[1\] .* not \[0.2\]"),
        ({"trained_betas": [1.0, 0.5], "num_train_timesteps": 2}, "from 0 to 0 at timestep 1, and has to fall"),
        ({"trained_betas": [1e-17, 0.5], "num_train_timesteps": 2}, "from 1 to 1 at timestep 0"),
        ({"beta_end": 1}, "has to fall at each, to 0 at the last at the earliest"),
    ],
)
def test_schedules_that_cannot_be(fields, message):
    with pytest.raises(WeightsError, match=message) as caught:
        schedule_from_json({**DDIM, **fields})
    assert len(str(caught.value)) < 800


def test_a_schedule_made_by_hand_is_checked_too():
    with pytest.raises(InputError, match=r"trained_betas is a tuple of numbers, not \[0.1\]"):
        NoiseSchedule(1, trained_betas=[0.1])


# -- diffusers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        PNDM,
        {**PNDM, "rescale_betas_zero_snr": True},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 300},
        {"beta_schedule": "linear", "num_train_timesteps": 37, "set_alpha_to_one": False},
        {"trained_betas": [0.1, 0.3, 0.2], "num_train_timesteps": 3},
        {"num_train_timesteps": 1},
    ],
)
def test_parity_of_alpha_bars_with_diffusers(fields):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler.from_config({k: v for k, v in fields.items() if k != "_class_name"})
    ours = schedule_from_json({**DDIM, **fields})
    np.testing.assert_allclose(ours.alpha_bars, theirs.alphas_cumprod.numpy(), atol=1e-6)
    assert float(levels(ours, -1)[0]) == pytest.approx(float(theirs.final_alpha_cumprod), abs=1e-6)


def test_the_files_that_diffusers_writes(tmp_path):
    pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    for name in ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "LCMScheduler"):
        theirs = getattr(diffusers, name)(num_train_timesteps=50, trained_betas=[0.01] * 50)
        theirs.save_pretrained(tmp_path / name)
        ours = schedule_from_json(tmp_path / name / "scheduler_config.json")
        np.testing.assert_allclose(ours.alpha_bars, theirs.alphas_cumprod.numpy(), atol=1e-6)
        assert ours.timestep_spacing == theirs.config.timestep_spacing
        assert ours.clip_sample == getattr(theirs.config, "clip_sample", False)
