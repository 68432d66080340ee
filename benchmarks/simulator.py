"""One task of Meta-World in MuJoCo: runs its scripted policy, and renders what happened off-screen.

A process holds one `Simulator`: a second renderer in the same process returns garbage. Importing this module needs
the packages of requirements-manipulation.txt and a library for off-screen OpenGL: OSMesa, or with MUJOCO_GL=egl a GPU.
"""

import colorsys
import os
import warnings
from typing import NamedTuple

import numpy as np

os.environ.setdefault("MUJOCO_GL", "osmesa")
os.environ.setdefault("LP_NUM_THREADS", "0")  # OSMesa renders in the calling thread: there is a process per core

import mujoco
from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
from metaworld.policies import ENV_POLICY_MAP

warnings.filterwarnings("ignore", message="Constant", category=UserWarning)  # actions are clipped

GEOM = int(mujoco.mjtObj.mjOBJ_GEOM)  # comparing an array with the enum takes as long as an image
AFTER_SUCCESS = 8  # steps that an episode goes on for
START = 0.05  # how far the hand starts from its usual place, along each axis, in metres
NOISE = 0.15  # largest standard deviation of the noise on a policy's actions, which are in [-1,1]
AZIMUTH, ELEVATION = (115, 160), (-45, -20)  # degrees: beside the robot, where its elbow is not in the way
DEFAULT_RGBA = (0.5, 0.5, 0.5, 1)  # a geom of this colour gets its material's
SIZE_OF_OBJECTS = 0.09  # metres around the hand and the objects' centres that the camera shows


class Episode(NamedTuple):
    """What is needed to render an episode of L steps.

    Attributes:
        states: float64 (L,Q), the positions of all joints.
        places: float64 (P,3), where the hand and the objects were, in metres.
    """

    states: np.ndarray
    places: np.ndarray


class Simulator:
    """A task, ready to run and to render.

    Args:
        task: its name without the version, such as "drawer-open".
        size: side of the frames in pixels.
    """

    def __init__(self, task: str, size: int):
        self.policy = ENV_POLICY_MAP[f"{task}-v3"]
        self.env = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task}-v3-goal-observable"](seed=0)
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True  # a random start, from `env.seed`
        self.model, self.data = self.env.model, mujoco.MjData(self.env.model)
        self.usual_hand = np.array(self.env.hand_init_pos)
        self.usual_look = {name: getattr(self.model, name).copy() for name in LOOKS}
        self.movable = self.model.body_weldid[self.model.geom_bodyid] != 0  # per geom; 0 is the world
        self.model.vis.quality.offsamples = 0  # half the time of an image; a video of 112 pixels hardly shows it
        self.renderer = mujoco.Renderer(self.model, size, size)
        for effect in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.renderer.scene.flags[effect] = False  # most of the time of an image
        self.options = mujoco.MjvOption()
        self.options.sitegroup[:] = 0  # marks of the goal

    def run(self, rng: np.random.Generator, *, min_steps: int, max_steps: int) -> Episode | None:
        """Runs the policy from a random start until it has succeeded; None if it doesn't within `max_steps`."""
        self.env.seed(int(rng.integers(2**31)))
        self.env.hand_init_pos = self.usual_hand + rng.uniform(-START, START, 3)
        noise, policy = rng.uniform(0, NOISE), self.policy()
        seen, _ = self.env.reset()
        states, places, end = [self.env.data.qpos.copy()], [places_in(seen)], None
        for step in range(max_steps):
            action = policy.get_action(seen) + rng.normal(0, noise, 4)
            seen, _, _, _, info = self.env.step(np.clip(action, -1, 1).astype(np.float32))
            states.append(self.env.data.qpos.copy())
            places.append(places_in(seen))
            if end is None and info["success"]:
                end = max(step + AFTER_SUCCESS, min_steps - 2)
            if step == end:
                break
        return None if end is None else Episode(np.stack(states), np.concatenate(places))

    def render(self, episode: Episode, rng: np.random.Generator, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Renders frames at equal distances, from a random camera, in random light and colours.

        Returns:
            Frames uint8 (T,H,W,3), and the mask bool (T,H,W) of the arm and of every other part that can move.
        """
        for name, usual in self.usual_look.items():
            getattr(self.model, name)[:] = LOOKS[name](usual, rng)
        camera = choose_camera(episode.places, self.model.vis.global_.fovy, rng)
        frames, masks = [], []
        for step in np.linspace(0, len(episode.states) - 1, num_frames).round().astype(int):
            self.data.qpos = episode.states[step]
            mujoco.mj_fwdPosition(self.model, self.data)
            self.renderer.update_scene(self.data, camera, self.options)
            frames.append(self.renderer.render())
            self.renderer.enable_segmentation_rendering()
            masks.append(self.foreground(self.renderer.render()))
            self.renderer.disable_segmentation_rendering()
        return np.stack(frames), np.stack(masks)

    def foreground(self, segments: np.ndarray) -> np.ndarray:
        """Bool (H,W) from MuJoCo's segmentation int32 (H,W,2): object and its type; -1 is the sky."""
        number, kind = segments[..., 0], segments[..., 1]
        return (kind == GEOM) & self.movable[np.clip(number, 0, self.model.ngeom - 1)]


def places_in(seen: np.ndarray) -> np.ndarray:
    """The places of the hand and the one or two objects in a Meta-World observation: (2 or 3,3), in metres."""
    places = np.stack([seen[0:3], seen[4:7], seen[11:14]])
    return places if places[2].any() else places[:2]


def choose_camera(places: np.ndarray, fovy: float, rng: np.random.Generator) -> mujoco.MjvCamera:
    """A camera that stands still and shows all of `places` (P,3), from a random direction."""
    low, high = places.min(0), places.max(0)
    radius = np.linalg.norm(high - low) / 2 + SIZE_OF_OBJECTS
    camera = mujoco.MjvCamera()
    camera.lookat = (low + high) / 2 + rng.uniform(-0.03, 0.03, 3)
    camera.distance = max(radius / np.sin(np.radians(fovy / 2)) * rng.uniform(0.85, 1.1), 0.5)
    camera.azimuth, camera.elevation = rng.uniform(*AZIMUTH), rng.uniform(*ELEVATION)
    return camera


def draw_colours(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random colours (count,3) in [0,1], none of them dark."""
    drawn = rng.uniform((0, 0, 0.6), (1, 0.8, 1), (count, 3))
    return np.array([colorsys.hsv_to_rgb(*hsv) for hsv in drawn]).reshape(count, 3)


def recolour_materials(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.column_stack([draw_colours(len(rgba), rng), rgba[:, 3]])


def recolour_geoms(rgba: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Geoms of one colour, such as the arm's, stay of one colour; hidden ones stay hidden."""
    usual, which = np.unique(rgba, axis=0, return_inverse=True)
    drawn = np.column_stack([draw_colours(len(usual), rng), usual[:, 3]])
    by_material = (usual == DEFAULT_RGBA).all(1)
    return np.where(by_material[:, None], usual, drawn)[which.ravel()]


# What differs between episodes in MuJoCo's model, and how its usual value becomes a random one.
LOOKS = {
    "mat_rgba": recolour_materials,
    "geom_rgba": recolour_geoms,
    "light_diffuse": lambda usual, rng: usual * rng.uniform(0.7, 2.2, (len(usual), 1)),
    "light_dir": lambda usual, rng: usual + rng.normal(0, 0.4, usual.shape),
}
