"""A switch looks at no more than it needs, and comes to the same."""

import torch
from audit_support import STEPS, config_of, graph_of, weights

from turbopi.audit.subjects import make_pair, parse_subject
from turbopi.audit.switches import Switching, coarse_switches


def test_what_a_switch_does_not_need_is_not_told() -> None:
    config = config_of("pi05-tiny")
    graph = graph_of(config, steps=STEPS)
    reference = weights(config, torch.float32, "reference")
    candidate = make_pair(
        parse_subject("turbo-twins:bf16", "cpu"), weights(config, torch.bfloat16), reference, None
    ).candidate
    everything = Switching(graph, ())
    plain = candidate.run(graph.sample, everything)
    switches = {switch.name: switch for switch in coarse_switches(list(everything.told))}
    for name in ("vision norm", "prefix layer 1", "expert attention", "encode_images"):
        names = switches[name].names
        told_all, told_few = Switching(graph, names), Switching(graph, names, everything.told)
        actions = candidate.run(graph.sample, told_all)
        assert torch.equal(candidate.run(graph.sample, told_few), actions)
        assert not torch.equal(actions, plain)
        assert names <= set(told_few.told) < set(told_all.told)


def test_sources_are_the_nearest_tensors_told() -> None:
    graph = graph_of(config_of("pi05-tiny"))
    layer = "prefix.layers.1"
    assert graph.sources([f"{layer}.q_raw"], graph.known) == {f"{layer}.norm1"}
    without = graph.known - {f"{layer}.norm1"}
    assert graph.sources([f"{layer}.q_raw"], without) == graph.sources([f"{layer}.norm1"], graph.known)
