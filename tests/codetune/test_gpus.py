import pytest

from codetune import adapter
from codetune.gpus import GPUS, find_gpu, parse_cluster


@pytest.mark.parametrize(
    ("text", "name", "machines", "per_machine"),
    [
        ("H100", "H100", 1, 1),
        ("8xH100", "H100", 1, 8),
        ("8 x h100", "H100", 1, 8),
        ("64xA100-80", "A100-80", 8, 8),
        ("3x4xL40S", "L40S", 3, 4),
        ("2xRTX4090", "RTX4090", 1, 2),
        ("8x4090", "RTX4090", 1, 8),
        ("mi300x", "MI300X", 1, 1),
    ],
)
def test_numbers_of_gpus_are_read(text: str, name: str, machines: int, per_machine: int) -> None:
    cluster = parse_cluster(text)
    assert (cluster.gpu.name, cluster.machines, cluster.per_machine) == (name, machines, per_machine)
    assert cluster.count == machines * per_machine


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("8xH10", "did you mean H100"),
        ("8xA100", "A100-40 or A100-80"),
        ("0xH100", "0 is no number"),
        ("1.5xH100", "1.5 is no number"),
        ("-8xH100", "-8 is no number"),
        ("2x2x2xH100", "at most machines x GPUs"),
        ("12xH100", "write|say how they stand, machines x GPUs: 2x6xH100"),
        ("8x", "no GPU is named"),
        ("abacus", "known here: A100-40"),
    ],
)
def test_what_is_wrong_with_a_number_of_gpus_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_cluster(text)


@pytest.mark.parametrize("name", GPUS)
def test_peaks_are_those_that_mfu_is_measured_against(name: str) -> None:
    reference = adapter.peak_flops_of_gpu(GPUS[name].reported, "bfloat16")
    assert reference in (None, GPUS[name].flops)


def test_most_devices_are_in_the_librarys_table() -> None:
    unknown = {name for name, gpu in GPUS.items() if adapter.peak_flops_of_gpu(gpu.reported, "bfloat16") is None}
    assert unknown == {"RTX3090", "RTX4090", "RTX5090"}


def test_this_machine_is_a_device_too() -> None:
    assert find_gpu("cpu").memory_bytes > 2**28 and not find_gpu("cpu").is_gpu
