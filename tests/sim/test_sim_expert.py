from types import SimpleNamespace

import numpy as np
import pytest

from turbopi.sim.expert import CLOSE, OPEN, PHASES, SpatialExpert
from turbopi.sim.grasp import (
    HIGH_GRIP,
    INNER_GRIP,
    LOW_GRIP,
    choose_grasp,
    grasp_at_hand,
    hand_rotation,
    hand_yaw,
    rim_points,
    rotation_error,
)
from turbopi.sim.scene import Boxes, Snapshot

BOWL, GOAL = np.array([-0.1, 0.0, 0.9]), np.array([-0.05, 0.2, 0.902])


def boxes(*entries: tuple[tuple[float, float, float], tuple[float, float, float]]) -> Boxes:
    centre, half = (np.array([e[i] for e in entries]).reshape(-1, 3) for i in range(2))
    return Boxes(centre, np.broadcast_to(np.eye(3), (len(entries), 3, 3)), half)


def snapshot(obstacles: Boxes, **changes: object) -> Snapshot:
    values = {
        "hand": np.array([-0.2, 0.0, 1.17]),
        "hand_rotation": hand_rotation(0.0),
        "hand_velocity": np.zeros(3),
        "gap": 0.08,
        "closing": 0.0,
        "bowl": BOWL,
        "bowl_rotation": np.eye(3),
        "goal": GOAL,
        "pinched": False,
        "placed": False,
        "obstacles": obstacles,
    }
    return Snapshot(**(values | changes))


def test_gaps_between_boxes_outside_inside_and_to_none() -> None:
    some = boxes(((0, 0, 0), (1, 2, 3)), ((10, 0, 0), (1, 1, 1)))
    others = boxes(((4, 0, 0), (1, 1, 1)), ((0, 4.5, 0), (1, 1, 1)), ((0.5, 0, 0), (1, 1, 1)))
    np.testing.assert_allclose(some.gap(others), [2, 1.5, -1.5])
    assert np.isinf(boxes().gap(others)).all()
    assert len(some.near(np.zeros(3), 0.1).half) == 1
    np.testing.assert_allclose(some.tops(), [3, 1])
    np.testing.assert_allclose(some.lateral(np.array([4.0, 0, 9])), [3, 5])


def test_the_gap_of_turned_boxes() -> None:
    c = np.sqrt(0.5)
    turned = Boxes(np.array([[3.0, 0, 0]]), np.array([[[c, -c, 0], [c, c, 0], [0, 0, 1]]]), np.ones((1, 3)))
    np.testing.assert_allclose(boxes(((0, 0, 0), (1, 1, 1))).gap(turned), 2 - np.sqrt(2))


def test_a_thin_wall_through_a_box_is_deep() -> None:
    wall = boxes(((0, 0, 0), (0.002, 1, 1)))
    np.testing.assert_allclose(wall.gap(boxes(((0.01, 0, 0), (0.05, 0.01, 0.01)))), -0.042)


@pytest.mark.parametrize("yaw", [-1.5, -0.3, 0.0, 1.2])
def test_rotations(yaw: float) -> None:
    turned = hand_rotation(yaw)
    assert hand_yaw(turned) == pytest.approx(yaw)
    np.testing.assert_allclose(rotation_error(turned, hand_rotation(0.0)), [0, 0, yaw], atol=1e-12)
    np.testing.assert_allclose(turned[:, 2], [0, 0, -1])


def test_rotation_error_of_half_a_turn_is_not_zero() -> None:
    assert np.linalg.norm(rotation_error(hand_rotation(np.pi), hand_rotation(0.0))) == pytest.approx(np.pi)


def test_a_free_bowl_is_taken_without_turning_the_hand() -> None:
    grasp = choose_grasp(snapshot(boxes()))
    assert abs(grasp.yaw) < 0.01
    assert grasp.grip == LOW_GRIP


def test_the_hand_keeps_away_from_neighbours() -> None:
    walls = boxes(((-0.1, 0.09, 0.93), (0.1, 0.01, 0.03)), ((-0.1, -0.09, 0.93), (0.1, 0.01, 0.03)))
    grasp = choose_grasp(snapshot(walls))
    assert abs(grasp.yaw) > 0.7
    assert grasp.clearance > 0.004


def test_low_walls_all_around_raise_the_grip() -> None:
    sides = [((-0.1 + x, y, 0.93), (0.002 + 0.1 * (y != 0), 0.002 + 0.1 * (x != 0), 0.034)) for x, y in
             ((0.098, 0), (-0.098, 0), (0, 0.098), (0, -0.098))]  # fmt: skip
    assert choose_grasp(snapshot(boxes(*sides))).grip == HIGH_GRIP


def test_high_walls_all_around_put_the_hand_inside_the_rim() -> None:
    sides = [((-0.1 + x, y, 0.93), (0.002 + 0.1 * (y != 0), 0.002 + 0.1 * (x != 0), 0.028)) for x, y in
             ((0.100, 0), (-0.100, 0), (0, 0.080), (0, -0.080))]  # fmt: skip
    state = snapshot(boxes(*sides))
    grasp = choose_grasp(state)
    assert grasp.grip == INNER_GRIP
    open_, closed = (np.linalg.norm((grasp.position(snapshot(boxes(), gap=g)) - BOWL)[:2]) for g in (0.08, 0.0))
    assert open_ == pytest.approx(INNER_GRIP[1])
    assert closed == pytest.approx(LOW_GRIP[1])


def test_the_choice_does_not_depend_on_the_hand_but_on_what_failed() -> None:
    scene = boxes(((-0.1, 0.12, 0.93), (0.1, 0.01, 0.03)))
    first = choose_grasp(snapshot(scene))
    assert choose_grasp(snapshot(scene, hand=np.array([0.1, 0.2, 1.0]), gap=0.01)) == first
    assert choose_grasp(snapshot(scene), refused=(first.direction,)).direction != first.direction


def test_a_hand_around_the_rim_keeps_its_side() -> None:
    state = snapshot(boxes(), hand_rotation=hand_rotation(0.0))
    at_rim = rim_points(state, np.array([np.pi / 2]), LOW_GRIP)[0]
    grasp = grasp_at_hand(snapshot(boxes(), hand=at_rim))
    assert grasp is not None
    assert grasp.direction == pytest.approx(np.pi / 2)
    assert grasp_at_hand(snapshot(boxes(), hand=at_rim, gap=0.0)) is None
    assert grasp_at_hand(state) is None


# With the simulator.


@pytest.fixture(scope="module")
def env():
    pytest.importorskip("libero")
    from turbopi.sim.libero import LiberoEnv, load_task

    with LiberoEnv(load_task("libero_spatial", 8), cameras=False) as env:
        yield env


def play(env, expert: SpatialExpert, until: str | None = None) -> list[np.ndarray]:
    """Act until a phase begins, or to the end of the episode."""
    actions = []
    while env.steps < env.task.step_limit and not env.success:
        actions.append(expert.act())
        if until is not None and expert.phase == until:
            break
        env.step(actions[-1])
    return actions


def test_an_official_state_smoothly(env) -> None:
    env.reset(0)
    expert = SpatialExpert(env)
    before = env.raw.sim.get_state().flatten()
    assert expert.act().shape == (7,)
    np.testing.assert_array_equal(env.raw.sim.get_state().flatten(), before)
    actions = np.array(play(env, expert))
    assert env.success
    assert expert.done
    assert env.steps < 150
    assert np.abs(actions).max() <= 1.0
    assert np.abs(np.diff(actions[:, :6], axis=0)).mean() < 0.06
    assert (np.diff(actions[:, 6]) != 0).sum() <= 3


def test_it_takes_over_in_every_phase_and_agrees_with_itself(env) -> None:
    env.reset(1)
    expert, seen, differences = SpatialExpert(env), set(), []
    while env.steps < env.task.step_limit and not env.success:
        action = expert.act()
        if env.steps % 5 == 0:
            seen.add(expert.phase)
            differences.append(np.abs(SpatialExpert(env).act() - action).max())
        env.step(action)
    assert env.success
    assert seen >= {"reach", "descend", "grasp", "carry"}
    assert seen <= set(PHASES)
    assert np.mean(np.array(differences) < 0.05) > 0.9


def test_a_dropped_bowl_is_taken_again(env) -> None:
    env.reset(2)
    expert = SpatialExpert(env)
    play(env, expert, until="carry")
    for _ in range(10):
        env.step(np.array([0.0] * 6 + [OPEN]))
    assert expert.act()[6] == OPEN
    play(env, SpatialExpert(env))
    assert env.success


def test_a_held_bowl_is_carried_on_at_once(env) -> None:
    env.reset(2)
    play(env, SpatialExpert(env), until="carry")
    fresh = SpatialExpert(env)
    assert fresh.act()[6] == CLOSE
    assert fresh.phase in ("lift", "carry")


def test_the_other_bowl_and_letting_go(env) -> None:
    env.reset(3)
    expert = SpatialExpert(env, target="akita_black_bowl_2")
    for _ in range(env.task.step_limit):
        env.step(expert.act())
        if expert.phase == "retreat":
            break
    assert expert.done
    assert not env.success


def test_a_new_scene_is_noticed(env) -> None:
    env.reset(0)
    expert = SpatialExpert(env)
    play(env, expert, until="descend")
    env.reset(seed=7)
    expert.act()
    assert expert.phase == "reach"


def test_an_unknown_object_is_named() -> None:
    model = SimpleNamespace(_model=None, nbody=1, body_id2name=lambda i: "plate_1_main")
    env = SimpleNamespace(raw=SimpleNamespace(sim=SimpleNamespace(model=model)))
    with pytest.raises(ValueError, match=r"no target 'cup_1'; it has plate_1"):
        SpatialExpert(env, target="cup_1")
