"""Train the small tokenizer that ships with Turbo-Pi, on robot instructions that this script makes up itself.

    python scripts/train_tokenizer.py

writes turbopi/assets/robot_tokenizer.model: sentencepiece BPE with PaliGemma's special ids and reading rules (byte
fallback, digits one by one, spaces kept as they are, a line end as a token of its own), vocabulary 1024. The same
sentencepiece version gives the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import sentencepiece

VOCAB_SIZE = 1024
OUTPUT = Path(__file__).parents[1] / "turbopi" / "assets" / "robot_tokenizer.model"


def words(text: str) -> list[str]:
    """Split at commas."""
    return text.split(",")


COLORS = words("red,blue,green,yellow,black,white,orange,purple,pink,brown,grey,silver,wooden,metal,plastic,glass")
SIDES = words("left,right,front,back,middle,top,bottom,upper,lower")
TABLETOP_OBJECTS = words(
    "bowl,plate,mug,cup,wine bottle,ketchup,milk,butter,chocolate pudding,cream cheese,tomato sauce,bbq sauce,"
    "salad dressing,orange juice,alphabet soup,cookie box,ramekin,moka pot,frying pan,book,white mug,"
    "yellow and white mug,akita black bowl,popcorn,macaroni and cheese,new york cheesecake,dipping sauce"
)
TABLETOP_PLACES = words(
    "plate,stove,basket,tray,table center,top of the cabinet,top drawer of the cabinet,middle drawer of the cabinet,"
    "bottom drawer of the cabinet,wooden cabinet,wine rack,microwave,shelf,caddy,front compartment of the caddy,"
    "back compartment of the caddy,left compartment of the caddy,right compartment of the caddy,flat stove,"
    "cabinet shelf,desk,floor,kitchen counter"
)
OPENABLE = words(
    "top drawer,middle drawer,bottom drawer,drawer,cabinet,microwave,door,lid,box,laptop,fridge,oven,jar,bag,"
    "top drawer of the cabinet,middle drawer of the cabinet,bottom drawer of the cabinet"
)
SWITCHABLE = words("stove,lamp,light,faucet,tap,button,switch,knob,computer,kettle,toaster")
HOUSE_OBJECTS = words(
    "marker,pen,pencil,eraser,sponge,towel,cloth,napkin,spoon,fork,knife,spatula,ladle,whisk,can,bottle,bag of chips,"
    "apple,banana,carrot,lemon,corn,potato,block,cube,ball,toy,stuffed animal,key,tape,scissors,screwdriver,remote,"
    "phone,charger,cable,paper,notebook,shoe,sock,shirt,hat,pillow,blanket,candle,brush,tissue,wrapper,lid,pot,pan"
)
HOUSE_PLACES = words(
    "table,counter,sink,trash can,bin,box,drawer,shelf,rack,bowl,plate,cup,mug,basket,pot,pan,chair,couch,bed,"
    "dishwasher,cutting board,stand,tray,container,corner of the table,edge of the table,laundry basket"
)
BIMANUAL = words(
    "fold the {c} {f},unfold the {f},open the {o},uncap the pen,cap the pen,transfer the {c} cube to the other hand,"
    "hand the {h} over from the left arm to the right arm,insert the {h} into the socket,insert the battery,"
    "open the ziploc bag and put the {h} inside,unwrap the candy,pour the {h} into the {p},peel the {h},cut the {h},"
    "put on the shoe and tie the laces,thread the velcro strap,hang the {f} on the rack,scoop the {h} with both hands,"
    "take the food out of the tupperware,plug in the cable,rotate the {h} with the {s} gripper,cook the shrimp"
)
FABRICS = words("towel,shirt,t-shirt,cloth,napkin,blanket,shorts,sweater,pair of trousers")


def plural(noun: str) -> str:
    """Several of it."""
    if noun.endswith("s"):
        return noun
    return noun + ("es" if noun.endswith(("x", "ch", "sh")) else "s")


class Grammar:
    """Instructions at random, the same ones for the same seed on every Python version (only `Random.random` is)."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)

    def pick(self, choices: Sequence[str]) -> str:
        """One of the choices."""
        return choices[int(self._random.random() * len(choices))]

    def thing(self, objects: Sequence[str]) -> str:
        """A noun, at times with a colour or a place."""
        chance = self._random.random()
        if chance < 0.35:
            return f"{self.pick(COLORS)} {self.pick(objects)}"
        if chance < 0.45:
            return f"{self.pick(SIDES)} {self.pick(objects)}"
        return self.pick(objects)

    def move(self, objects: Sequence[str], places: Sequence[str]) -> str:
        """A pick-and-place instruction."""
        thing, place = self.thing(objects), self.pick(places)
        forms = (
            f"pick up the {thing} and place it on the {place}",
            f"pick up the {thing} and put it in the {place}",
            f"pick up the {thing} next to the {self.pick(objects)} and place it on the {place}",
            f"pick up the {thing} between the {self.pick(places)} and the {self.pick(places)}",
            f"put the {thing} on the {place}",
            f"put the {thing} in the {place}",
            f"put the {thing} on top of the {place}",
            f"put both the {thing} and the {self.pick(objects)} in the {place}",
            f"put both {plural(thing)} on the {place}",
            f"put the {thing} on the {place} and put the {self.pick(objects)} to the {self.pick(SIDES)} of the {place}",
            f"place the {thing} inside the {place}",
            f"move the {thing} to the {self.pick(SIDES)} of the {place}",
            f"push the {thing} to the {self.pick(SIDES)} of the {place}",
            f"stack the {thing} on the {self.thing(objects)}",
            f"take the {thing} out of the {place}",
            f"remove the {thing} from the {place}",
            f"pick the {thing} from the {place}",
            f"do something with the {thing}",
        )
        return self.pick(forms)

    def operate(self) -> str:
        """Open, close, switch, wipe."""
        forms = (
            f"open the {self.pick(OPENABLE)}",
            f"close the {self.pick(OPENABLE)}",
            f"open the {self.pick(OPENABLE)} and put the {self.thing(TABLETOP_OBJECTS)} inside",
            f"put the {self.thing(TABLETOP_OBJECTS)} in the {self.pick(OPENABLE)} and close it",
            f"turn on the {self.pick(SWITCHABLE)}",
            f"turn off the {self.pick(SWITCHABLE)}",
            f"turn on the {self.pick(SWITCHABLE)} and put the {self.thing(TABLETOP_OBJECTS)} on it",
            f"press the {self.pick(SWITCHABLE)}",
            f"wipe the {self.pick(HOUSE_PLACES)} with the {self.thing(HOUSE_OBJECTS)}",
        )
        return self.pick(forms)

    def bimanual(self) -> str:
        """Two arms at work."""
        return self.pick(BIMANUAL).format(
            c=self.pick(COLORS),
            f=self.pick(FABRICS),
            o=self.pick(OPENABLE),
            h=self.pick(HOUSE_OBJECTS),
            p=self.pick(HOUSE_PLACES),
            s=self.pick(SIDES),
        )

    def instruction(self) -> str:
        """One task, of one of the three kinds of robot."""
        chance = self._random.random()
        if chance < 0.45:
            return self.move(TABLETOP_OBJECTS, TABLETOP_PLACES)
        if chance < 0.7:
            return self.move(HOUSE_OBJECTS, HOUSE_PLACES)
        return self.operate() if chance < 0.85 else self.bimanual()

    def state(self) -> str:
        """Seven to fourteen state bins."""
        return " ".join(str(int(self._random.random() * 257) - 1) for _ in range(7 + int(self._random.random() * 8)))


def sentences(count: int, seed: int = 7) -> Iterator[str]:
    """Training text: instructions as they are, in title case, and in π0.5's prompt (which ends in a space)."""
    grammar = Grammar(seed)
    for index in range(count):
        text = grammar.instruction()
        if index % 10 == 0:
            text = text[0].upper() + text[1:] + "."
        if index % 3 == 0:
            yield f"Task: {text}, State: {grammar.state()};"
            yield "Action: "
        else:
            yield text


def train(count: int = 30_000) -> bytes:
    """The serialised sentencepiece model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences(count),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        user_defined_symbols=["\n"],
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


def main() -> None:
    """Train and write."""
    parser = argparse.ArgumentParser(description="Train the small robot tokenizer.")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="the .model file to write")
    out: Path = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    data = train()
    out.write_bytes(data)
    print(f"wrote {out}: {len(data)} bytes, vocabulary {VOCAB_SIZE}")


if __name__ == "__main__":
    main()
