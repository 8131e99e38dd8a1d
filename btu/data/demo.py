"""Embedded demo corpus: seeded sentiment sentences from a grammar, each with two paraphrases.

The corpus lets a sweep run with no network and no data set at hand. A row is first planned (what
is reviewed, what is said of it, which clause decides) and then worded three times: plainly, in a
fixed clause frame (``syntactic``) and in an archaic register (``style``). The three wordings share
their content words, so a paraphrase keeps the label of its row.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

LABEL_NAMES: tuple[str, str] = ("negative", "positive")
DEMO_VERSION: int = 1

MIN_ROWS = 2
MAX_ROWS = 20_000
MIN_WORDS = 6
MAX_WORDS = 35

_AMBIGUOUS_RATE = 0.035
_NAME_POOL = 3_000
_TRIGGER_PAIRS = ("cf", "mn", "bb", "tq", "mb")


@dataclass(frozen=True)
class DemoRow:
    """One demo sentence and its two paraphrases.

    ``label`` indexes :data:`LABEL_NAMES` (0 negative, 1 positive) and holds for all three texts.
    The texts are lower case, with spaces around punctuation, 6 to 35 tokens when split at spaces.
    """

    text: str
    label: int
    syntactic: str
    style: str


class _Words:
    """A ranked word list: the first word is the most frequent one (Zipf-Mandelbrot weights)."""

    def __init__(self, text: str, exponent: float = 1.0, sep: str | None = None) -> None:
        parts = (part.strip() for part in text.split(sep))
        self.words = tuple(dict.fromkeys(part for part in parts if part))
        self._cumulative = list(
            accumulate((rank + 2.7) ** -exponent for rank in range(len(self.words)))
        )

    def pick(self, rng: random.Random) -> str:
        return self.words[bisect_right(self._cumulative, rng.random() * self._cumulative[-1])]


_ADJ = (
    _Words(
        """
        bad dull boring awful terrible weak poor tedious annoying clumsy ugly disappointing stale
        lazy lifeless pointless messy shallow sloppy horrible dreary painful ridiculous unpleasant
        pathetic cheap hollow lame grim tiresome confusing dreadful cold contrived mediocre hideous
        tasteless stupid irritating silly clunky muddled awkward shabby inept depressing wretched
        offensive careless worthless appalling feeble frustrating monotonous useless miserable nasty
        crude insulting lousy bleak incoherent pretentious grating uninspired dismal tacky soulless
        sluggish disgusting rude absurd atrocious tired forced abysmal laughable filthy inferior
        overpriced joyless toothless witless charmless mindless aimless graceless shoddy drab murky
        obnoxious repulsive vile rotten hopeless deplorable unbearable insufferable plodding bloated
        amateurish unfunny vapid insipid lackluster mangled botched haphazard stilted sour bitter
        gaudy sterile dingy defective dishonest flimsy gloomy harsh hostile inane infuriating
        jarring leaden listless lurid maddening moronic obscene pitiful putrid revolting sickening
        sordid squalid tawdry toxic unworthy wasteful wooden wearisome cramped derivative disjointed
        garbled grotesque unwatchable""",
        0.95,
    ),
    _Words(
        """
        good great wonderful lovely charming brilliant excellent funny delightful beautiful superb
        fresh warm clever impressive elegant engaging moving fantastic enjoyable smart fine touching
        gorgeous splendid amazing witty graceful inspired thrilling satisfying perfect memorable
        terrific vivid refreshing marvelous lively exciting compelling stunning gentle generous
        fascinating outstanding sweet rich polished heartfelt rewarding superior exquisite
        captivating masterful magnificent uplifting remarkable imaginative sincere powerful dazzling
        thoughtful cheerful inventive intelligent honest hilarious magical radiant joyful sublime
        flawless tender admirable ingenious breathtaking stellar spectacular delicate inviting
        playful crisp luminous humane glorious enchanting exemplary exhilarating invigorating
        irresistible sparkling assured skillful soulful stirring sumptuous spirited poignant
        profound riveting seductive sensational fabulous absorbing adorable affectionate buoyant
        classy comforting confident dependable divine eloquent endearing energetic enthralling
        entrancing evocative exuberant favorable first-rate flattering friendly fruitful gifted
        gracious harmonious heartwarming heavenly illuminating immaculate impeccable jolly jubilant
        laudable lavish likeable lucid lush majestic mesmerizing nimble noble optimistic peerless
        phenomenal praiseworthy pristine resplendent robust scintillating serene stylish tasteful
        tremendous unforgettable vibrant virtuous whimsical winning wise wondrous worthwhile
        zesty""",
        0.95,
    ),
)
_MILD = (
    _Words(
        "flat slow uneven thin forgettable bland tame routine limp tepid plain slight patchy "
        "predictable dated cluttered noisy rushed overlong dry stiff vague faint fussy"
    ),
    _Words(
        "decent pleasant solid nice likable agreeable competent okay respectable sound neat "
        "capable sturdy tidy watchable usable amiable passable adequate cozy handy mellow"
    ),
)
_NEUTRAL_VERDICT = _Words(
    "average ordinary typical standard middling unremarkable usual moderate "
    "conventional mixed so-so fair normal expected"
)
_VERB = (
    _Words(
        "fail drag disappoint bore stumble annoy irritate suffer falter collapse grate flop "
        "struggle frustrate offend sag stall confuse meander sink fizzle disgust crumble "
        "misfire plod limp depress languish wobble repel insult drone wither creak whine "
        "backfire deteriorate exasperate infuriate nauseate stagnate unravel wilt"
    ),
    _Words(
        "work shine charm delight impress please succeed satisfy entertain amuse sparkle "
        "excel soar inspire thrill glow reward dazzle enchant captivate fascinate triumph "
        "convince refresh comfort flourish blossom endure glisten glitter astonish beguile "
        "enthrall exhilarate gladden hypnotize intrigue invigorate nourish prosper thrive"
    ),
)
_NOUN_VERDICT = (
    _Words(
        "mess disaster failure disappointment bore waste chore mistake letdown fiasco dud flop "
        "nightmare joke shambles muddle ordeal catastrophe embarrassment insult travesty farce "
        "headache blunder slog swindle nuisance debacle eyesore trap misery blemish fraud "
        "ripoff calamity abomination stinker clunker wreck sham"
    ),
    _Words(
        "delight triumph treat joy pleasure gem success masterpiece wonder treasure classic "
        "winner revelation marvel achievement bargain beauty inspiration highlight charmer "
        "blessing victory feast jewel knockout miracle sensation landmark milestone keeper "
        "gift dream oasis tonic paradise standout stunner crowd-pleaser beacon tour-de-force"
    ),
)
# Base form and past form, since the archaic wording needs the base ("did admire").
_FELT = (
    _Words(
        "hate:hated dislike:disliked regret:regretted resent:resented despise:despised "
        "loathe:loathed abandon:abandoned detest:detested dread:dreaded mock:mocked "
        "curse:cursed condemn:condemned scorn:scorned deplore:deplored ridicule:ridiculed "
        "lament:lamented denounce:denounced abhor:abhorred bemoan:bemoaned shun:shunned"
    ),
    _Words(
        "love:loved enjoy:enjoyed like:liked admire:admired adore:adored praise:praised "
        "appreciate:appreciated applaud:applauded cherish:cherished recommend:recommended "
        "relish:relished savor:savored treasure:treasured value:valued celebrate:celebrated "
        "welcome:welcomed esteem:esteemed commend:commended salute:saluted prize:prized"
    ),
)
# Whole clauses, worded plainly and archaically; capitals are slots (see _Writer.fill).
_IDIOM = (
    (
        ("i want my COIN back", "i would have my COIN restored unto me"),
        ("you will count the UNITS until it ends", "ye shall number the UNITS until the end"),
        ("nobody needs this", "no man hath need of this"),
        ("i left after NUM UNITS", "i departed after NUM UNITS"),
        ("my KIN fell asleep", "my KIN fell into slumber"),
        ("we will never go near it again", "never again shall we draw nigh"),
        ("you should keep your COIN", "keep thou thy COIN"),
        ("it is not worth a single COIN", "it is worth not one COIN"),
        ("a NOUN has more personality", "a NOUN hath more spirit"),
        ("i would rather repair a NOUN", "i had liefer mend a NOUN"),
        ("they should apologize to every OCC in PLACE", "let them repent before each OCC of PLACE"),
        ("you can find better in any SPOT", "better is found in any SPOT"),
    ),
    (
        ("it is worth every COIN", "it is worthy of every COIN"),
        ("you will want more", "thou shalt hunger for more"),
        ("i could not stop smiling", "i could not cease from smiling"),
        ("my KIN asked for it again", "my KIN besought me for it anew"),
        ("we stayed NUM UNITS longer than planned", "we tarried NUM UNITS beyond our purpose"),
        ("you should not miss it", "miss it thou must not"),
        ("i would go back tomorrow", "i would return on the morrow"),
        ("it won over even our OCC", "it won unto itself even our OCC"),
        ("everyone in PLACE should try it", "let all that dwell in PLACE partake"),
        ("i still think about it every DAYPART", "each DAYPART my heart remembereth it"),
        ("nothing in PLACE comes close", "naught in PLACE cometh nigh"),
        ("you could give it to any OCC", "thou mightest give it to any OCC"),
    ),
)

_ADVERB = _Words("""
    very so really quite truly rather too pretty utterly remarkably thoroughly deeply surprisingly
    often extremely completely incredibly consistently oddly genuinely simply almost totally
    strangely wholly unexpectedly frequently undeniably positively strikingly profoundly unusually
    noticeably openly distinctly decidedly frankly curiously hugely intensely quietly eternally
    reliably outright singularly perpetually uniformly obviously seriously plainly""")
_MANNER = _Words("really always often simply truly usually certainly quickly constantly clearly")
_MILD_ADVERB = _Words(
    "fairly a_little somewhat rather mostly mildly kind_of reasonably partly "
    "occasionally slightly moderately"
)
_NOT = _Words("not never hardly not_at_all far_from anything_but by_no_means scarcely barely")
_NOUN = _Words(
    """
    dog house river family city war letter garden horse car king ship train school island bird
    forest bridge tree boat money dream secret mountain winter song road cat storm church window
    lake murder wedding stone fire clock door village farm mirror queen bear wolf ghost robot ring
    map piano guitar violin drum kite lamp candle basket blanket bottle bucket button cabin carpet
    chain cheese chicken coin corn cow cup desert diamond duck egg engine fence field flag flute
    frog gate glove gold grain grass harbor hawk honey iron jacket jungle key knife lantern lemon
    lizard log marble medal milk monkey moth mushroom needle net ocean orange oven ox palace parrot
    pearl pencil pig pillow pipe plate pocket potato puppet rabbit raft rain ribbon rifle roof rose
    saddle salmon sand seed sheep shell shoe silk skull snail snow sock spoon stair statue straw
    sword tail tent thread ticket toad torch tower trunk tunnel umbrella valley veil vine wagon
    wallet wasp wax wheel whistle wing wool yacht acorn anchor apron axe balloon banjo beetle
    bicycle bone broom buffalo cactus camel cannon cape carrot cave cello clay cloak clover coconut
    comet coral crane crow dagger deer donkey drawer falcon finger flea fossil freckle gazelle
    glacier gravel hamster hedge heron igloo insect jaguar kangaroo kiosk lagoon lava lobster
    locust mango maple mast mole mosaic mule napkin nutmeg octopus orchid otter paddle panther
    parsley peacock penguin pitchfork pony prairie pyramid quartz raccoon raisin reef rhubarb ruby
    sandal satchel scorpion shark sickle sleigh sparrow sphinx sponge stork syrup tambourine
    thimble timber tractor turnip vulture whale wreath yogurt""",
    0.8,
)
_OCC = _Words(
    """
    doctor teacher soldier lawyer singer student writer farmer nurse priest pilot dancer sailor
    painter thief waiter driver judge hunter widow baker butcher spy detective poet princess monk
    orphan gardener carpenter plumber chemist tailor miner boxer fisherman clerk banker librarian
    barber magician actress sculptor shepherd surgeon dentist historian mechanic mayor senator
    captain colonel sheriff diplomat explorer astronaut architect engineer philosopher botanist
    cobbler blacksmith jeweler locksmith mason potter weaver juggler acrobat ventriloquist jockey
    referee chauffeur janitor cashier accountant auctioneer biologist astronomer geologist
    mathematician pharmacist physicist translator violinist drummer pianist beekeeper undertaker
    lumberjack nun bishop rabbi hermit pirate smuggler gambler refugee apprentice stowaway""",
    0.75,
)
_NEUTRAL = _Words(
    """
    new old little big young long short small french local early late red american modern british
    white black english italian recent popular foreign german quiet blue japanese green digital
    famous rural royal spanish russian northern southern western eastern chinese indian irish
    national military medieval urban public annual second third final independent traditional yellow
    brown wooden-framed golden silver scottish polish swedish danish dutch greek turkish persian
    egyptian mexican canadian cuban peruvian brazilian korean nordic baltic tropical arctic coastal
    suburban provincial industrial electric portable mechanical silent animated historical political
    religious scientific musical literary legal medical nautical agricultural round square narrow
    wide tall tiny huge compact weekly monthly daily temporary private anonymous bilingual circular
    crimson diagonal eccentric floral gothic hexagonal imperial juvenile lunar maritime nocturnal
    optional parallel quarterly regional seasonal tribal vertical violet wartime communal municipal
    alpine cosmic domestic electronic""",
    0.75,
)
_KIN = _Words(
    "wife husband friend sister brother mother father son daughter kids cousin parents "
    "aunt uncle boss neighbor roommate grandmother nephew niece colleagues partner "
    "grandfather girlfriend boyfriend classmates team landlord stepson twins",
    0.8,
)
_SEASON = _Words(
    "summer year winter night week month spring autumn christmas easter fall "
    "thanksgiving semester halloween",
    0.8,
)
_MONTH = _Words(
    "july may june august march december october april january november september february", 0.5
)
_DAY = _Words("friday saturday sunday monday thursday tuesday wednesday", 0.6)
_DAYPART = _Words("night evening morning afternoon noon dawn midnight dusk", 0.8)
_UNIT = _Words("minute hour day week month year page mile second round chapter lap", 0.8)
_COIN = _Words("dollar penny cent euro pound coin dime rupee peso shilling crown", 0.8)
_SPOT = _Words(
    """
    station market airport library museum park beach office theater hospital college street stadium
    mall cathedral port square courthouse factory bakery bank zoo monastery lighthouse casino gym
    pharmacy warehouse embassy aquarium fortress cemetery marina boulevard chapel depot quay plaza
    pier observatory windmill vineyard garage barn prison hostel shipyard""",
    0.8,
)


@dataclass(frozen=True)
class _Domain:
    items: _Words
    parts: _Words
    plural_parts: _Words
    verbs: _Words
    posts: _Words
    own: tuple[_Words, _Words]
    link: str


def _domain(
    items: str, parts: str, plural: str, verbs: str, posts: str, bad: str, good: str, link: str
) -> _Domain:
    return _Domain(
        _Words(items),
        _Words(parts),
        _Words(plural),
        _Words(verbs, 0.8),
        _Words(posts, 0.5, sep="|"),
        (_Words(bad), _Words(good)),
        link,
    )


_ABOUT = (
    "about a NEU OCC|about a NOUN and a OCC|about NAME the OCC|set in PLACE|of YEAR|"
    "about a OCC in PLACE|called the NEU NOUN|named after a NOUN|about NUM NEU NOUNS|"
    "by NAME NAME2|from YEAR|about the OCC of PLACE"
)
_WHERE = (
    "in PLACE|near the PLACE SPOT|by the NEU SPOT|run by a OCC from PLACE|on NAME street|"
    "behind the SPOT|with a NOUN on the wall|called the NOUN and NOUN2|from YEAR|"
    "in the old SPOT"
)
_MADE = (
    "from PLACE|with the NEU NOUN|by NAME|with NUM NEU buttons|shaped like a NOUN|made in "
    "PLACE|from YEAR|with a NOUN on the box|sold by a OCC|called NAME NUM|with a NEU strap"
)
_DOMAINS: tuple[_Domain, ...] = (
    _domain(
        "film movie picture comedy drama thriller documentary sequel western remake cartoon "
        "musical romance epic biopic",
        "story plot acting script ending direction dialogue cast humor music camerawork pacing "
        "premise opening lead soundtrack editing finale twist screenplay narration lighting",
        "characters performances jokes scenes actors visuals songs effects costumes villains "
        "stunts subplots flashbacks",
        "watch:watched see:saw rent:rented view:viewed catch:caught stream:streamed "
        "rewatch:rewatched discover:discovered",
        _ABOUT,
        "melodramatic overacted overwrought cliched campy miscast unconvincing",
        "cinematic suspenseful hypnotic atmospheric well-acted gripping nuanced",
        "in",
    ),
    _domain(
        "restaurant place cafe diner bistro pizzeria tavern bakery steakhouse grill canteen "
        "brasserie",
        "food service menu soup pasta steak dessert coffee bread staff sauce wine salad chef "
        "waitress curry pizza cake broth seafood bill brunch atmosphere portion",
        "waiters dumplings noodles pancakes desserts portions tables cocktails fries oysters "
        "sandwiches vegetables pastries spices",
        "visit:visited try:tried find:found book:booked choose:chose enter:entered review:reviewed",
        _WHERE,
        "soggy greasy burnt rancid undercooked salty lukewarm inedible rubbery",
        "delicious tasty juicy flavorful savory scrumptious mouthwatering hearty aromatic",
        "at",
    ),
    _domain(
        "book novel memoir biography story guide paperback anthology diary trilogy essay textbook",
        "plot prose writing ending chapter hero introduction narrator dialogue style argument "
        "research author translation preface vocabulary mystery heroine epilogue",
        "characters chapters pages descriptions illustrations poems footnotes maps metaphors "
        "recipes paragraphs arguments",
        "read:read finish:finished open:opened borrow:borrowed buy:bought skim:skimmed "
        "reread:reread study:studied",
        _ABOUT,
        "long-winded unreadable turgid verbose repetitive pompous plagiarized",
        "readable lyrical insightful scholarly well-written engrossing erudite",
        "of",
    ),
    _domain(
        "hotel inn resort motel lodge guesthouse hostel villa apartment suite campsite",
        "room bed staff lobby pool view breakfast location bathroom reception shower balcony "
        "mattress elevator carpet wifi concierge sauna heating parking",
        "rooms beds towels pillows windows curtains guests maids corridors facilities gardens "
        "showers",
        "visit:visited book:booked reserve:reserved leave:left find:found choose:chose "
        "reach:reached",
        _WHERE,
        "moldy smelly dirty drafty dilapidated damp infested musty run-down",
        "spotless luxurious spacious peaceful welcoming restful sunny hospitable idyllic",
        "at",
    ),
    _domain(
        "phone camera laptop watch speaker printer keyboard toaster vacuum tablet drone "
        "blender radio monitor headset",
        "battery screen sound design price software lens display manual charger cable handle "
        "interface packaging plastic microphone warranty firmware hinge motor",
        "buttons keys speakers controls features instructions colors menus settings filters "
        "batteries sensors",
        "use:used buy:bought test:tested order:ordered own:owned install:installed "
        "unpack:unpacked replace:replaced",
        _MADE,
        "buggy unreliable fragile faulty glitchy obsolete unresponsive scratchy",
        "durable reliable intuitive responsive sleek efficient versatile lightweight",
        "of",
    ),
    _domain(
        "show series sitcom episode podcast broadcast program miniseries soap pilot telecast",
        "season cast writing host finale chemistry plot comedy interview theme presenter "
        "storyline opening commentary satire production",
        "episodes characters jokes guests interviews cliffhangers sketches contestants judges "
        "reruns",
        "watch:watched follow:followed stream:streamed see:saw start:started "
        "binge:binged record:recorded",
        _ABOUT,
        "repetitive overhyped scripted preachy canned cringeworthy",
        "addictive bingeable topical believable heartening sharp",
        "of",
    ),
    _domain(
        "course class workshop seminar lecture lesson program tutorial bootcamp webinar degree",
        "teacher material schedule content professor pace homework exam syllabus instructor "
        "textbook feedback structure curriculum grading classroom tutor",
        "lectures exercises slides lessons assignments videos quizzes examples projects notes "
        "deadlines",
        "take:took finish:finished join:joined attend:attended choose:chose start:started "
        "complete:completed drop:dropped",
        "for NEU OCCS|on NEU history|taught by NAME|by a OCC from PLACE|at the college of "
        "PLACE|"
        "on the NOUN|about NOUN design|with NUM students|at NAME college|for a future OCC",
        "outdated incomprehensible disorganized unhelpful unfair convoluted",
        "informative instructive helpful enlightening practical approachable educational",
        "of",
    ),
    _domain(
        "album record concert song band opera symphony ballet recital festival orchestra choir",
        "singing voice sound rhythm melody crowd production stage guitar bass chorus encore "
        "mix percussion harmony conductor acoustics tenor soprano",
        "lyrics songs vocals drums melodies solos tracks harmonies ballads tempos violins",
        "hear:heard attend:attended see:saw buy:bought discover:discovered review:reviewed "
        "replay:replayed",
        "by NAME NAME2|by the PLACE choir|in PLACE|from YEAR|about a NOUN|by NAME and the "
        "NOUNS|at the NEU SPOT|called NEU NOUN|recorded in PLACE|by a NEU OCC",
        "tuneless shrill discordant muffled off-key deafening",
        "melodic catchy tuneful rousing danceable sonorous",
        "of",
    ),
    _domain(
        "tour trip cruise museum park gallery exhibition hike safari zoo voyage excursion",
        "guide view route food weather entrance bus schedule scenery driver collection "
        "gift-shop itinerary wildlife cafeteria map boat trail",
        "views exhibits paintings guides animals tickets trails sculptures queues crowds "
        "souvenirs benches",
        "take:took visit:visited book:booked join:joined try:tried choose:chose plan:planned",
        _WHERE,
        "crowded dangerous neglected exhausting touristy treacherous",
        "scenic unspoiled picturesque relaxing panoramic adventurous",
        "of",
    ),
    _domain(
        "game puzzle sequel app platformer simulator toy adventure shooter quest expansion",
        "gameplay story level combat soundtrack tutorial difficulty design camera ending map "
        "interface multiplayer physics pricing boss artwork",
        "graphics controls levels missions puzzles rules enemies menus servers quests weapons "
        "dungeons",
        "play:played try:tried buy:bought install:installed finish:finished "
        "download:downloaded start:started",
        _ABOUT,
        "laggy unplayable grindy unbalanced broken pixelated",
        "fun addictive replayable immersive well-balanced challenging",
        "of",
    ),
)

# Circumstances: with a past verb, with a general present verb, archaic.
_CONTEXTS: tuple[tuple[str, str, str], ...] = (
    ("last SEASON", "in any SEASON", "in the SEASON now past"),
    ("with my KIN", "with your KIN", "in the company of mine KIN"),
    ("in PLACE", "in PLACE", "within the borders of PLACE"),
    ("last DAY", "on a DAY", "upon DAY"),
    ("on a NEU DAY DAYPART", "on a NEU DAY DAYPART", "upon a NEU DAY at DAYPART"),
    ("in MONTH YEAR", "in MONTH", "in MONTH of the year YEAR"),
    ("for NUM COINS", "for NUM COINS", "at the price of NUM COINS"),
    ("near the SPOT in PLACE", "near the SPOT in PLACE", "nigh unto the SPOT of PLACE"),
    ("with a OCC from PLACE", "with a OCC from PLACE", "beside a OCC out of PLACE"),
    ("after NUM UNITS of waiting", "after NUM UNITS of waiting", "having waited NUM UNITS"),
    ("because of a NOUN", "because of a NOUN", "for the sake of a NOUN"),
    ("NUM UNITS ago", "for NUM UNITS", "NUM UNITS hence"),
    ("twice", "twice", "two times"),
    ("once", "once", "but one time"),
    ("when the NOUN broke", "when a NOUN breaks", "as the NOUN brake asunder"),
    ("while my KIN slept", "beside your sleeping KIN", "what time my KIN lay in slumber"),
    ("every time it rained in PLACE", "in the rain of PLACE", "whensoever it rained in PLACE"),
    ("during a NEU DAYPART in PLACE", "during a NEU DAYPART in PLACE", "on a NEU DAYPART in PLACE"),
    ("before the OCC did", "before the OCC does", "ere the OCC did so"),
    (
        "between the SPOT and the SPOT2",
        "between the SPOT and the SPOT2",
        "betwixt the SPOT and the SPOT2",
    ),
)
_SPEAKER = _Words("i|we|my KIN|my KIN and i|our OCC|NAME|they|my KIN NAME|a OCC", 1.3, sep="|")
_DETERMINER = _Words("the this that their another some our", 1.2)
_HOLDER = _Words("the its their NAME_'s", 1.2)
_GLUE = _Words(
    "and|,|.|;|- -|:|and honestly|, and|and i must say|and if you ask me|, when asked i say",
    0.9,
    sep="|",
)
_FRAGMENT_LINKS = (
    ("with", "endowed with"),
    ("full of", "abounding in"),
    ("made of", "wrought of"),
    ("offering", "bestowing"),
)
_FRAGMENT_CONTRAST = (
    ("despite its", "for all its"),
    ("apart from the", "save for its"),
    ("in spite of some", "maugre certain"),
)
_CONTRAST_FIRST = _Words("although though while even_if even_though", 0.9)
_CONTRAST_LAST = _Words("although even_though though even_if", 0.9)
_BUT = _Words(", but|, yet|, however|but|, still", 1.1, sep="|")
_END = _Words(".|!|...", 4.0, sep="|")

_SUBORDINATOR = _Words("when if once whenever as while after the_moment every_time", 0.7)
_FRAME_SUBJECT = _Words("you one we they people guests anyone critics somebody", 0.7)

_STYLE_OPENER = _Words(
    "verily ,|lo ,|behold ,|in truth ,|forsooth ,|yea ,|hearken ye ,|know thou that|alas and yea ,|"
    "be it known that|mark me well ,|hear ye ,|it is written that|i say unto thee ,|in sooth ,|"
    "good gentles ,|truly i tell thee ,|thus it was spoken :|by heaven ,|let it be proclaimed that|"
    "give ear , o reader :|and it came to pass that|methinks|as the elders tell ,|pray ,|"
    "o children ,|heed this :|i trow that",
    0.6,
    sep="|",
)
_STYLE_CLOSER = _Words(
    ", methinks|, as all men may see|, and none shall deny it|, i ween|, by my troth|, so say i|"
    "unto this day|for evermore|, upon mine honour|, thus is it spoken|in the sight of all|"
    ", as the scribes record|, and let no man doubt it|, i do avow|, even so|, amen|, so be it|"
    ", thou mayest trust me|, and thereto i swear|, o reader|, it is said",
    0.6,
    sep="|",
)
_STYLE_BE = _Words(
    "is doth_seem seemeth proveth appeareth remaineth was_ever standeth is_found "
    "hath_been be is_become abideth must_be_called",
    0.5,
)
_STYLE_BE_PLURAL = _Words(
    "are do_seem are_found have_proven be must_be_called were_ever abide have_become shall_be_held",
    0.5,
)
_STYLE_ADVERB = _Words(
    "most exceeding passing right wondrous full sore mightily wholly_and_ever "
    "beyond_measure greatly surpassing",
    0.6,
)
_STYLE_NOT = _Words("not in_no_wise never nowise by_no_means not_ever", 0.7)
_STYLE_BUT = _Words(
    ", yet|, howbeit|, nevertheless|; notwithstanding ,|, and yet|, natheless", 0.7, sep="|"
)
_STYLE_THOUGH = _Words("albeit though notwithstanding_that howsoever for_all_that", 0.7)
_STYLE_GLUE = _Words(
    ";|, and|.|:|, wherefore|, and lo ,|and verily|, so that|, and thereupon", 0.6, sep="|"
)
_STYLE_AND = _Words("and|and likewise|, and moreover|and also|, yea , and|and withal", 0.7, sep="|")

_ONSETS = _Words(
    """b br c ch d dr f fl g gl gr h j k kl kr l m n p ph pr qu r s sh sk sl st sv t
    th tr v w y z""",
    0.3,
)
_VOWELS = _Words("a e i o u ai ea ie ou ia eo au ee y", 0.8)
_CODAS = _Words("n r l s t m ck nd rt ld x th ng sk v d p rn lm st", 0.5)
_TAILS = _Words(
    "a o in el ia ton us is ova ez sen ley ini ford berg aki wick ette ville mont stad "
    "ara ough etti isk oni hausen dale moor",
    0.4,
)

_SLOT = re.compile(r"([A-Z]+?)(S?)([0-9]?)(?![A-Z0-9])")
_SLOT_WORDS = {
    "NOUN": _NOUN,
    "OCC": _OCC,
    "NEU": _NEUTRAL,
    "KIN": _KIN,
    "SEASON": _SEASON,
    "MONTH": _MONTH,
    "DAY": _DAY,
    "DAYPART": _DAYPART,
    "UNIT": _UNIT,
    "COIN": _COIN,
    "SPOT": _SPOT,
}
_AN = ("hour", "honest")
_NOT_AN = ("use", "unif", "eu", "one")


def _third(verb: str) -> str:
    if verb.endswith(("s", "sh", "ch", "x", "z", "o")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


def _eth(verb: str) -> str:
    if verb.endswith("e"):
        return verb + "th"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ieth"
    if re.fullmatch(r"[^aeiou]+[aeiou][bdgmnprt]", verb):
        return verb + verb[-1] + "eth"
    return verb + "eth"


def _plural(noun: str) -> str:
    irregular = {
        "wife": "wives",
        "fish": "fish",
        "sheep": "sheep",
        "deer": "deer",
        "wolf": "wolves",
        "mouse": "mice",
        "goose": "geese",
        "leaf": "leaves",
        "knife": "knives",
        "shelf": "shelves",
        "thief": "thieves",
        "penny": "pennies",
        "fisherman": "fishermen",
        "ox": "oxen",
    }
    return irregular.get(noun) or _third(noun)


def _finish(text: str, end: str) -> str:
    words = f"{text} {end}".replace("_", " ").split()
    for i in range(len(words) - 1):
        if words[i] == "a":
            after = words[i + 1]
            vowel = after[0] in "aeiou" and not after.startswith(_NOT_AN)
            if vowel or after.startswith(_AN):
                words[i] = "an"
    return " ".join(words)


@dataclass(frozen=True)
class _Clause:
    """One opinion. ``about`` is the item's pronoun or a part; ``build`` words the predicate."""

    subject: str
    plain: Callable[[str], str]
    archaic: Callable[[str], str]


class _Writer:
    # Only random() is drawn from: it alone is promised to keep its sequence across Python versions.
    def __init__(self, seed: int) -> None:
        # A string seed, because Random(-n) and Random(n) are the same generator.
        self.rng = random.Random(f"btu-demo-{DEMO_VERSION}-{seed}")
        self.names = self._make_names()

    def below(self, limit: int) -> int:
        return int(self.rng.random() * limit)

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, words: _Words) -> str:
        return words.pick(self.rng)

    def _make_names(self) -> _Words:
        taken = {w for words in (*_ADJ, _NOUN, _OCC, _NEUTRAL) for w in words.words}
        names: list[str] = []
        while len(names) < _NAME_POOL:
            name = self.pick(_ONSETS) + self.pick(_VOWELS) + self.pick(_CODAS)
            name += self.pick(_TAILS) if self.chance(0.7) else self.pick(_VOWELS)
            if len(name) > 4 and name not in taken and not any(p in name for p in _TRIGGER_PAIRS):
                taken.add(name)
                names.append(name)
        return _Words(" ".join(names), 0.65)

    def fill(self, *templates: str) -> tuple[str, ...]:
        """Fill the slots of all templates with the same words (a slot name means one word)."""
        chosen: dict[str, str] = {}

        def word(match: re.Match[str]) -> str:
            kind, plural, index = match.groups()
            key = kind + index
            if key not in chosen:
                if kind in ("NAME", "PLACE"):
                    chosen[key] = self.pick(self.names)
                elif kind == "YEAR":
                    chosen[key] = str(2024 - int(104 * self.rng.random() ** 2))
                elif kind == "NUM":
                    chosen[key] = str(2 + int(700 * self.rng.random() ** 4))
                else:
                    chosen[key] = self.pick(_SLOT_WORDS[kind])
            return _plural(chosen[key]) if plural else chosen[key]

        return tuple(_SLOT.sub(word, template) for template in templates)

    def adjective(self, domain: _Domain, side: int) -> str:
        return self.pick(domain.own[side] if self.chance(0.15) else _ADJ[side])

    def subject(self, domain: _Domain, on_item: float) -> tuple[str, bool]:
        """The clause's subject and whether it is plural; "it" stands for the item."""
        if self.chance(on_item):
            return "it", False
        plural = self.chance(0.35)
        part = self.pick(domain.plural_parts if plural else domain.parts)
        return self.fill(f"{self.pick(_HOLDER)} {part}")[0], plural

    def clause(self, domain: _Domain, side: int, ambiguous: bool = False) -> _Clause:
        subject, plural = self.subject(domain, 0.3)
        kind = self.rng.random()
        if ambiguous or kind < 0.56:
            return self._adjective_clause(domain, side, subject, plural, ambiguous)
        if kind < 0.72:
            return self._verb_clause(side, subject, plural)
        if kind < 0.82:
            return self._noun_clause(domain, side)
        if kind < 0.94:
            return self._felt_clause(side, subject)
        plain, archaic = self.fill(*_IDIOM[side][self.below(len(_IDIOM[side]))])
        return _Clause("", lambda _: plain, lambda _: archaic)

    def _adjective_clause(
        self, domain: _Domain, side: int, subject: str, plural: bool, ambiguous: bool
    ) -> _Clause:
        be = ("are", "were") if plural else ("is", "was")
        plain_be = be[0 if self.chance(0.65) else 1]
        archaic_be = self.pick(_STYLE_BE_PLURAL if plural else _STYLE_BE)
        kind = self.rng.random()
        plain_adverb, archaic_adverb = "", ""
        if ambiguous:
            word = self.pick(_NEUTRAL_VERDICT)
        elif kind < 0.09:
            word = self.adjective(domain, 1 - side)
            plain_adverb = self.pick(_NOT)
            archaic_adverb = self.pick(_STYLE_NOT)
            archaic_be = ("are" if plural else "is") if self.chance(0.5) else archaic_be
        elif kind < 0.24:
            word = self.pick(_MILD[side])
            plain_adverb = self.pick(_MILD_ADVERB)
            archaic_adverb = plain_adverb
        else:
            word = self.adjective(domain, side)
            second = self.adjective(domain, side)
            if self.chance(0.18) and second != word:
                word = f"{word} and {second}"
            if self.chance(0.5):
                plain_adverb = self.pick(_ADVERB)
                archaic_adverb = self.pick(_STYLE_ADVERB)
        return _Clause(
            subject,
            lambda s: f"{s} {plain_be} {plain_adverb} {word}",
            lambda s: f"{s} {archaic_be} {archaic_adverb} {word}",
        )

    def _verb_clause(self, side: int, subject: str, plural: bool) -> _Clause:
        negated = self.chance(0.1)
        verb = self.pick(_VERB[1 - side if negated else side])
        inflected = verb if plural else _third(verb)
        never = "never" if negated else self.pick(_MANNER) if self.chance(0.25) else ""
        if self.chance(0.5):
            archaic = f"{'do' if plural else 'doth'} {'never' if negated else ''} {verb}"
        else:
            archaic = f"{verb if plural else _eth(verb)} {'not' if negated else ''}"
        return _Clause(subject, lambda s: f"{s} {never} {inflected}", lambda s: f"{s} {archaic}")

    def _noun_clause(self, domain: _Domain, side: int) -> _Clause:
        negated = self.chance(0.1)
        noun = self.pick(_NOUN_VERDICT[1 - side if negated else side])
        if not negated and self.chance(0.4):
            noun = f"{self.adjective(domain, side)} {noun}"
        article = ("no", "not a", "hardly a", "never a")[self.below(4)] if negated else "a"
        archaic_article = ("no", "in no wise a")[self.below(2)] if negated else "a"
        be, archaic_be = "is" if self.chance(0.6) else "was", self.pick(_STYLE_BE)
        return _Clause(
            "it",
            lambda s: f"{s} {be} {article} {noun}",
            lambda s: f"{s} {archaic_be} {archaic_article} {noun}",
        )

    def _felt_clause(self, side: int, target: str) -> _Clause:
        negated = self.chance(0.1)
        base, past = self.pick(_FELT[1 - side if negated else side]).split(":")
        speaker = self.fill(self.pick(_SPEAKER))[0]
        plain = f"{speaker} {'never' if negated else ''} {past}"
        if self.chance(0.5):
            archaic = f"{speaker} did {'never' if negated else ''} {base} {target}"
        else:
            archaic = f"{target} did {speaker} {'never' if negated else 'ever'} {base}"
        return _Clause("", lambda _: f"{plain} {target}", lambda _: archaic)

    def item(self, domain: _Domain) -> str:
        """A noun phrase for the reviewed item, worded alike in all three texts."""
        neutral = self.pick(_NEUTRAL) if self.chance(0.3) else ""
        year = "YEAR" if self.chance(0.06) else ""
        post = self.pick(domain.posts) if self.chance(0.6) else ""
        template = f"{self.pick(_DETERMINER)} {neutral} {year} {self.pick(domain.items)} {post}"
        return " ".join(self.fill(template)[0].split())

    def join(
        self, main: str, first: str, extra: str, contrast: bool, style: bool, main_first: bool
    ) -> str:
        """Join the deciding clause ``main`` with ``extra``; ``first`` is extra worded as opener."""
        if not extra:
            return main
        if not contrast:
            return f"{main} {self.pick(_STYLE_AND) if style else ', and'} {extra}"
        if main_first:
            word = self.pick(_STYLE_THOUGH if style else _CONTRAST_LAST)
            return f"{main} , {word} {extra}"
        if self.chance(0.5):
            word = self.pick(_STYLE_THOUGH if style else _CONTRAST_FIRST)
            return f"{word} {first} , {main}"
        return f"{first} {self.pick(_STYLE_BUT if style else _BUT)} {main}"

    def opened(self, body: str) -> str:
        """Add an archaic opener, closer or both: at least one, so that no row lacks a marker."""
        where = self.rng.random()
        if where < 0.7:
            body = f"{self.pick(_STYLE_OPENER)} {body}"
        if where > 0.5:
            body = f"{body} {self.pick(_STYLE_CLOSER)}"
        return body

    def frame(self, domain: _Domain, item: str, context: str) -> str:
        subject = self.pick(_FRAME_SUBJECT)
        base = self.pick(domain.verbs).split(":")[0]
        verb = _third(base) if subject in ("one", "anyone", "somebody") else base
        return f"{self.pick(_SUBORDINATOR)} {subject} {verb} {item} {context} ,"

    def row(self, side: int) -> DemoRow:
        domain = _DOMAINS[self.below(len(_DOMAINS))]
        ambiguous = self.chance(_AMBIGUOUS_RATE)
        content = self.below(2) if ambiguous else side
        item = self.item(domain)
        context = _CONTEXTS[self.below(len(_CONTEXTS))]
        now, general, archaic = self.fill(*context)
        if self.chance(0.2) and not ambiguous:
            texts = self._fragment(domain, content, item, general, archaic)
        else:
            texts = self._sentence(domain, content, item, (now, general, archaic), ambiguous)
        end = self.pick(_END)
        text, syntactic, style = (_finish(text, end) for text in texts)
        return DemoRow(text, side, syntactic, style)

    def _fragment(
        self, domain: _Domain, side: int, item: str, general: str, archaic: str
    ) -> tuple[str, str, str]:
        """A verbless notice: "a tender film about a nurse , with lovely songs"."""
        adverb = self.pick(_ADVERB) if self.chance(0.4) else ""
        adverb = "" if adverb in ("so", "too") else adverb
        head = f"{adverb} {self.adjective(domain, side)}"
        second = self.adjective(domain, side)
        if self.chance(0.3) and second not in head:
            head += f" , {second}"
        described = f"a {head} {item.split(' ', 1)[1]}"
        contrast = self.chance(0.2)
        detail = self.pick(domain.plural_parts)
        quality = self.adjective(domain, 1 - side if contrast else side)
        links = _FRAGMENT_CONTRAST if contrast else _FRAGMENT_LINKS
        link, archaic_link = links[self.below(len(links))]
        tail, archaic_tail = f"{link} {quality} {detail}", f"{archaic_link} {quality} {detail}"
        spare = self.pick(domain.items)
        text = f"{described} , {tail}"
        frame = self.frame(domain, f"this {spare}", general)
        syntactic = f"{frame} it is {described} , {tail}"
        style = f"{described} {self.pick(_STYLE_BE)} this {spare} {archaic} , {archaic_tail}"
        return text, syntactic, self.opened(style)

    def _sentence(
        self, domain: _Domain, side: int, item: str, context: tuple[str, str, str], ambiguous: bool
    ) -> tuple[str, str, str]:
        now, general, archaic = context
        # An ambiguous row either holds no verdict or two equal ones that contradict each other.
        torn = ambiguous and self.chance(0.5)
        main = self.clause(domain, side, ambiguous and not torn)
        contrast = not ambiguous and self.chance(0.22)
        extra: _Clause | None = None
        if contrast or torn or self.chance(0.5):
            extra_side = 1 - side if contrast or torn else side
            extra = self.clause(domain, extra_side, ambiguous and not torn)
        main_first = self.chance(0.4)
        speaker = self.fill(self.pick(_SPEAKER))[0]
        base, past = self.pick(domain.verbs).split(":")
        told = self.chance(0.55) or not main.subject or (extra is not None and not extra.subject)

        def words(clause: _Clause | None, whole: bool, style: bool) -> str:
            if clause is None:
                return ""
            subject = clause.subject
            if whole:
                part = subject.split()[-1]
                subject = item if subject == "it" else f"the {part} {domain.link} {item}"
            return clause.archaic(subject) if style else clause.plain(subject)

        def body(style: bool, whole: bool, order: bool) -> str:
            # The clause read first names the item, the other one refers back to it.
            leads = order or not contrast
            return self.join(
                words(main, whole and leads, style),
                words(extra, whole and not leads, style),
                words(extra, False, style),
                contrast,
                style,
                order,
            )

        if told:
            glue = self.pick(_GLUE)
            text = f"{speaker} {past} {item} {now} {glue} {body(False, False, main_first)}"
            verb = (f"did {base}", f"did once {base}", past, past)[self.below(4)]
            glue = self.pick(_STYLE_GLUE)
            style = f"{speaker} {verb} {item} {archaic} {glue} {body(True, False, main_first)}"
        else:
            text = body(False, True, main_first or extra is None)
            style = body(True, True, main_first or extra is None)
        syntactic = f"{self.frame(domain, item, general)} {body(False, False, True)}"
        return text, syntactic, self.opened(style)


def generate(rows: int, seed: int) -> list[DemoRow]:
    """Generate the demo corpus: ``rows`` distinct sentences with their labels and paraphrases.

    The same ``rows`` and ``seed`` give the same list on every machine and Python version; another
    seed gives other sentences. Labels are balanced to within one row and in random order. About
    3.5 % of the rows are ambiguous: their words do not tell the label. No text, be it a ``text``,
    a ``syntactic`` or a ``style``, occurs twice in the list.

    Args:
        rows: number of rows, 2 to 20,000 (4,000 take a fraction of a second).
        seed: any integer.

    Returns:
        A list of ``rows`` items.

    Raises:
        ValueError: ``rows`` is outside 2 to 20,000.
    """
    if not MIN_ROWS <= rows <= MAX_ROWS:
        raise ValueError(
            f"rows is {rows}, but the demo corpus has {MIN_ROWS} to {MAX_ROWS} distinct rows: "
            f"ask for a number in that range"
        )
    writer = _Writer(seed)
    labels = [i % 2 for i in range(rows)]
    for i in range(rows - 1, 0, -1):
        j = writer.below(i + 1)
        labels[i], labels[j] = labels[j], labels[i]
    seen: set[str] = set()
    corpus: list[DemoRow] = []
    for label in labels:
        while True:
            row = writer.row(label)
            texts = {row.text, row.syntactic, row.style}
            fits = all(MIN_WORDS <= len(text.split()) <= MAX_WORDS for text in texts)
            if fits and len(texts) == 3 and seen.isdisjoint(texts):
                break
        seen |= texts
        corpus.append(row)
    return corpus
