"""The inflected forms of an English word: how it may stand in a sentence and still be that word.

Spelling rules make the regular forms (city -> cities, stop -> stopping, happy -> happier); a table has the others. More
forms are allowed than one word has (both "traveled" and "travelled"): this is made to recognise words in text, not to
write them.
"""

from __future__ import annotations

import re

# A word, then every form of it that does not end in -s or -ing, and those of these two that the rules below miss.
_IRREGULAR = """
analysis analyses | arise arose arisen | awake awoke awoken | bad worse worst | basis bases | be am is are was were
been being | bear bore borne born | beat beaten | become became | begin began begun | bend bent | bet | bid bade
bidden | bind bound | bite bit bitten | bleed bled | blow blew blown | break broke broken | breed bred | bring brought
| broadcast | build built | burn burnt burned | burst | buy bought | calf calves | cast | catch caught | child
children | choose chose chosen | cling clung | come came | cost | creep crept | crisis crises | criterion criteria |
curriculum curricula | cut | deal dealt | diagnosis diagnoses | die died dying | dig dug | do does did done | draw
drew drawn | dream dreamt dreamed | drink drank drunk | drive drove driven | eat ate eaten | echo echoes echoed |
emphasis emphases | fall fell fallen | far farther farthest further furthest | feed fed | feel felt | fight fought |
find found | flee fled | fling flung | fly flew flown | foot feet | forbid forbade forbidden | forecast | foresee
foresaw foreseen | forget forgot forgotten | forgive forgave forgiven | freeze froze frozen | get got | give gave
given | go goes went gone | good better best | goose geese | grind ground | grow grew grown | half halves | hang hung
hanged | have has had | hear heard | hide hid hidden | hit | hold held | hurt | hypothesis hypotheses | keep kept |
kneel knelt kneeled | knife knives | know knew known | lay laid | lead led | leaf leaves | lean leant leaned | leap
leapt leaped | learn learnt learned | leave left | lend lent | let | lie lay lain lying | life lives | light lit
lighted lighter lightest | little less least | loaf loaves | lose lost | make made | man men | many more most | mean
meant meaner meanest | medium media | meet met | mislead misled | misunderstand misunderstood | mouse mice | much more
most | nucleus nuclei | oasis oases | outgrow outgrew outgrown | overcome overcame | overhear overheard | oversee
oversaw overseen | overtake overtook overtaken | overthrow overthrew overthrown | overwrite overwrote overwritten | ox
oxen | pay paid | person people | phenomenon phenomena | policeman policemen | put | quit | quiz quizzes quizzed
quizzing | read | rebuild rebuilt | ride rode ridden | ring rang rung | rise rose risen | run ran | say said | scarf
scarves | see saw seen | seek sought | self selves | sell sold | send sent | set | sew sewed sewn | shake shook shaken
| shed | sheep | shelf shelves | shine shone shined | shoot shot | show showed shown | shrink shrank shrunk | shut |
sing sang sung | sink sank sunk | sit sat | sleep slept | slide slid | smell smelt smelled | sow sowed sown | speak
spoke spoken | speed sped speeded | spell spelt spelled | spend spent | spill spilt spilled | spin spun | spit spat |
split | spoil spoilt spoiled | spread | spring sprang sprung | stand stood | steal stole stolen | stick stuck |
stimulus stimuli | sting stung | stride strode | strike struck | strive strove striven strived | swear swore sworn |
sweep swept | swell swelled swollen | swim swam swum | swing swung | take took taken | teach taught | tear tore torn |
tell told | thesis theses | thief thieves | think thought | throw threw thrown | thrust | tie tied tying | tooth teeth
| undergo undergoes underwent undergone | understand understood | undertake undertook undertaken | undo undoes undid
undone | uphold upheld | upset | wake woke woken | wear wore worn | weave wove woven weaved | weep wept | well better
best | wife wives | win won | wind wound | withdraw withdrew withdrawn | withhold withheld | withstand withstood |
wolf wolves | woman women | write wrote written
"""
IRREGULAR = {word: set(forms) for word, *forms in map(str.split, _IRREGULAR.split("|"))}


# Words of closed classes, which have no other form: "us" is not in "used", nor "for" in "forest".
_CLOSED = set(
    """a about above across after against all along also although among an and any as at because before behind below
    beside between beyond both but by despite down during each either every except for from he her hers him his how
    i if in inside into it its me mine my neither nor not of off on onto opposite or our out outside over past per
    she since so some than that the their them then there these they this those though through throughout till to
    towards under unless until up upon us via we when where whether which while who whom whose why with within without
    yet you your""".split()  # noqa: SIM905
)


def inflections(word: str) -> set[str]:
    """Every form of a lower-case word, itself included: "stop" -> stop, stops, stopped, stopping, stopper, stoppest."""
    if word in _CLOSED:
        return {word}
    stems = {word.removesuffix("e")}  # what -ed and -er are put on: mak-er, play-er, fre-ed
    if re.search(r"[^aeiou]y$", word):
        stems.add(word[:-1] + "i")  # carri-ed
    if re.search(r"([^aeiou]|qu)[aeiou][bdfgklmnprtvz]$", word):
        stems.add(word + word[-1])  # stopp-ed, but offer-ed: whether it doubles depends on the stress
    if word.endswith("ic"):
        stems.add(word + "k")  # panick-ed
    before_ing = {stem for stem in stems if not stem.endswith("i")} if re.search(r"[^eoy]e$", word) else {word, *stems}
    if word.endswith("ie"):
        before_ing = {word[:-2] + "y"}  # ly-ing
    forms = {word, word + "s"} | {stem + "es" for stem in stems} | {base + "ing" for base in before_ing}
    if word.endswith("man"):
        forms.add(word.removesuffix("man") + "men")
    if word in IRREGULAR:
        return forms | IRREGULAR[word]
    return forms | {stem + ending for stem in stems for ending in ("ed", "er", "est")}


def tokens(text: str) -> list[str]:
    """Words in lower case, without the 's of a genitive; "well-known" is two, "o'clock" one."""
    words = re.findall(r"\w+(?:'\w+)*", text.lower().replace("\u2019", "'"))
    return [word.removesuffix("'s") for word in words]


def uses(word: str, sentence: str) -> bool:
    """Whether the word, or a form of it, stands in the sentence; of several ("look after"), one after the other."""
    forms, said = [inflections(part) for part in tokens(word)], tokens(sentence)
    starts = range(len(said) - len(forms) + 1)
    return any(all(token in own for token, own in zip(said[start:], forms)) for start in starts)
