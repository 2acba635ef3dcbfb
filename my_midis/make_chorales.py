"""Rebuild this folder: Bach's four-part chorales from the corpus inside the music21 package, as two-staff piano MIDI.

    pip install music21 && python my_midis/make_chorales.py

Only this script needs music21; training and generating do not.
"""

from __future__ import annotations

from pathlib import Path

from music21 import chord, corpus, note
from symusic import KeySignature, Note, Score, Tempo, TimeSignature, Track

TICKS = 480  # per quarter note
TEMPO = 100  # quarter notes per minute: the sources give none
VELOCITIES = (84, 66, 66, 76)  # soprano, alto, tenor, bass: the outer voices lead, as a pianist would play them


def read_notes(part, velocity: int, shift: float) -> list[Note]:
    """The notes of one voice, tied notes joined, in ticks from the start of the first whole bar."""
    notes = []
    for element in part.stripTies().flatten().notes:
        pitches = element.pitches if isinstance(element, chord.Chord) else [element.pitch]
        start, length = (round(float(x) * TICKS) for x in (element.offset + shift, element.quarterLength))
        if isinstance(element, (note.Note, chord.Chord)) and length > 0:
            notes += [Note(start, length, pitch.midi, velocity) for pitch in pitches]
    return notes


def read_chorale(path: Path) -> Score | None:
    """One chorale as a score of two tracks, right hand and left hand; None if it has not exactly four voices."""
    source = corpus.parse(path)
    if len(source.parts) != 4:
        return None
    first_bar = source.parts[0].getElementsByClass("Measure").first()
    shift = first_bar.paddingLeft  # an upbeat is written at the end of a bar that begins with silence
    score = Score(TICKS)
    score.tempos.append(Tempo(0, TEMPO))
    for metre in source.parts[0].flatten().getElementsByClass("TimeSignature"):
        time = round(float(metre.offset + shift) * TICKS) if metre.offset else 0
        score.time_signatures.append(TimeSignature(time, metre.numerator, metre.denominator))
    for key in source.parts[0].flatten().getElementsByClass("KeySignature")[:1]:
        score.key_signatures.append(KeySignature(0, key.sharps, 0))
    voices = [read_notes(part, velocity, shift) for part, velocity in zip(source.parts, VELOCITIES)]
    for name, hand in (("right hand", voices[:2]), ("left hand", voices[2:])):
        track = Track(name=name, program=0)
        track.notes.extend(sorted((n for voice in hand for n in voice), key=lambda n: (n.time, n.pitch)))
        score.tracks.append(track)
    return score


def outer_voices(score: Score) -> set[tuple]:
    """Every run of six steps of highest and lowest pitch together: what two printings of one chorale share in any key."""
    by_onset: dict[int, list[int]] = {}
    for track in score.tracks:
        for n in track.notes:
            by_onset.setdefault(n.time, []).append(n.pitch)
    frame = [(max(pitches), min(pitches)) for _, pitches in sorted(by_onset.items())]
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(frame, frame[1:])]
    return {tuple(steps[i : i + 6]) for i in range(len(steps) - 5)}


def main() -> None:
    """Write every four-part chorale once, and print how many there are and what was left out."""
    folder, kept, left_out = Path(__file__).parent, {}, []
    for path in sorted(corpus.getComposer("bach")):
        score = read_chorale(path) if path.suffix == ".mxl" else None
        if score is None:
            left_out.append(f"{path.name} (not four voices in MusicXML)")
            continue
        runs = outer_voices(score)
        # A chorale printed twice would be trained on and validated on: a third of its runs in common is one piece.
        twin = next((name for name, other in kept.items() if len(runs & other) > len(runs) / 3), None)
        if twin:
            left_out.append(f"{path.name} (the same music as {twin})")
            continue
        kept[path.stem] = runs
        score.dump_midi(folder / f"{path.stem}.mid")
    print(f"{len(kept)} chorales written, {len(left_out)} left out: {', '.join(left_out)}")


if __name__ == "__main__":
    main()
