//! Words to make keys, lists and sentences from.
use std::sync::OnceLock;

/// Adjectives.
pub const ADJECTIVES: &str = "\
    able amber ancient angry arctic autumn awake azure bitter black blind bold brave brief bright brisk \
    broad broken bronze brown calm careful cheap cheerful chilly clean clear clever clumsy coastal cold \
    common copper cosy crimson crisp crooked curious daily damp dark dear deep delicate distant double \
    dry dull dusty eager early earnest eastern elegant empty equal even exact faint fair faithful famous \
    fancy fast fearless fertile fierce final fine firm flat floral foggy fond formal frank free fresh \
    friendly frosty full funny gentle giant glad gleaming golden graceful grand grateful green grey \
    handy happy harsh hasty heavy hidden high hollow honest humble hungry icy idle inland jolly keen \
    kind large late lazy lean level light little lively local lonely long loud lovely loyal lucky lunar \
    mellow merry mild modern modest narrow native neat nervous nimble noble noisy northern odd old open \
    orange orderly pale patient peaceful plain pleasant polite proud purple quick quiet rapid rare ready \
    red remote restless rich ripe rough round royal rural rusty salty scarlet secret serene shallow \
    sharp shiny short shy silent silver simple sleepy slender slim slow small smart smooth soft solar \
    solid southern spare square stable steady steep stern sticky still stormy straight strange strict \
    strong sturdy sudden sunny swift tall tame tender thick thin tidy tiny tired tough tranquil true \
    upper urban useful vast velvet violet vivid warm wary watchful western wet white whole wide wild \
    windy winter wise wooden worthy yellow young";

/// Nouns, none of them an adjective above.
pub const NOUNS: &str = "\
    acorn actor album alley almond anchor ankle antler anvil apple apron arch archer arrow artist aspen \
    attic author avenue badge bagpipe baker balcony ballad balloon bamboo banana banner barber bark \
    barley barn barrel basin basket battery beach beacon bead beaver bedroom beetle bell belt bench \
    berry bicycle biscuit blanket blossom boat bottle boulder bowl bracelet branch brass bread breeze \
    brick bridge broom brush bubble bucket buckle buffalo builder bundle bunker butcher butter button \
    cabbage cabin cable cactus cage camel camera canal candle cannon canoe canvas canyon captain caravan \
    cardinal cargo carpet carriage carrot castle catalog cathedral cattle cave cedar ceiling cello \
    cellar chain chair chalk chapel chapter charcoal cheese chef cherry chest chicken chimney cider \
    cinema circle circus citizen clarinet clay cliff clock cloth cloud clover coach cobbler coconut \
    coffee coin collar colony comet compass concert cone coral cork corn corner cottage cotton \
    cottonwood courier court cousin cradle crane crater crayon cream creek cricket crown crystal \
    cupboard curtain cushion cymbal dagger daisy dancer deer delta desert desk diamond diary dinner \
    doctor dolphin domino donkey door dragon drawer dress drum duck dune eagle earring easel echo editor \
    elbow elephant elm ember emerald engine engineer envelope estuary fabric factory falcon farmer \
    feather fence fern ferry festival fiddle field fig film finch finger fireplace fisher flag flame \
    flask flute foil forest fork fossil fountain fox frame freckle freezer friend frog fruit funnel \
    furnace galaxy gallery garden garlic garment gate gazelle gear geyser ginger giraffe glacier glass \
    glove goat goblet goose gorge granite grape grass gravel grocer guitar gull guest hallway hammer \
    hammock harbor harness harp hat hawk hazel hedge helmet hermit heron hill hinge honey hoof horizon \
    horn horse hotel husband iceberg inkwell insect island ivory jacket jaguar jar jasmine jelly jewel \
    jigsaw jockey journal judge juggler jungle juniper kayak kennel kettle keyboard kingdom kitchen kite \
    kitten knight ladder lagoon lake lamp lantern lark laundry lava lawn lawyer leaf leather lemon lens \
    leopard letter lever library lighthouse lily linen lion lizard lobby locket log loom lumber lynx \
    magnet maple marble market marsh mason meadow medal melon mentor merchant meteor miller mineral \
    mirror mitten moat monk monkey moss moth motor mountain mug museum mushroom mustard napkin needle \
    nephew nest nickel notebook novel nurse nutmeg oak oasis oboe ocean office olive onion opera orbit \
    orchard orchid organ otter oven owl oyster paddle page painter palace panda panther paper parade \
    parcel parrot passage pasture path peach peacock pear pearl pebble pelican pencil pepper piano \
    picnic picture pigeon pillow pilot pine pirate pitcher planet plank plant plate plaza pocket poem \
    poet pond pony poplar porch portrait potato potter pottery powder prairie printer prism puddle \
    pumpkin puppet puzzle pyramid quarry quartz queen quill quilt rabbit raccoon radio radish raft \
    railway rainbow ranch raven reef ribbon rice river road robin rocket roof rooster rope rose ruby rug \
    saddle sailor salad salmon sandal satchel saucer scarf scholar school scissors sculptor seal season \
    seed shadow shark shawl sheep shelf shell shepherd ship shirt shoe shovel shrub signal singer \
    skeleton sketch slipper snail snow soap sofa soldier spade sparrow spice spider spinach spoon spruce \
    squirrel stadium stair statue stem stone stork stove stream street student studio sugar summit \
    surgeon swallow swamp swan sweater sword table tailor tambourine teacher teapot temple tent thistle \
    thread throne thunder ticket tiger timber toad tomato torch tortoise tower trail train tree trumpet \
    tulip tunnel turkey turnip turtle uncle valley vase vault veil vessel village vine vinegar violin \
    volcano voyage wagon waiter walnut walrus warden water weaver wharf wheat wheel whistle widow willow \
    window wizard wolf woodpecker wreath writer yarn zebra";

/// Verbs of one thing that does something to another.
pub const VERBS: &str = "\
    admires answers avoids belongs borrows builds calls carries changes cleans collects covers crosses \
    describes draws drops enters examines explains finds finishes follows gathers guards hears helps \
    hides improves invites joins keeps leaves lifts likes loses measures meets mends moves notices \
    offers opens orders paints passes photographs polishes praises prepares presents protects pulls \
    reaches reads remembers repairs replaces returns sees sells shares shows sketches studies teaches \
    touches trusts turns visits washes watches weighs welcomes";

/// The words of a list.
fn split(words: &'static str, cache: &'static OnceLock<Vec<&'static str>>) -> &'static [&'static str] {
    cache.get_or_init(|| words.split_whitespace().collect())
}

/// [`ADJECTIVES`], one by one.
#[must_use]
pub fn adjectives() -> &'static [&'static str] {
    static LIST: OnceLock<Vec<&'static str>> = OnceLock::new();
    split(ADJECTIVES, &LIST)
}

/// [`NOUNS`], one by one.
#[must_use]
pub fn nouns() -> &'static [&'static str] {
    static LIST: OnceLock<Vec<&'static str>> = OnceLock::new();
    split(NOUNS, &LIST)
}

/// [`VERBS`], one by one.
#[must_use]
pub fn verbs() -> &'static [&'static str] {
    static LIST: OnceLock<Vec<&'static str>> = OnceLock::new();
    split(VERBS, &LIST)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn words_are_plain_and_different() {
        let all: Vec<_> = adjectives().iter().chain(nouns()).collect();
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
        assert!(adjectives().len() > 200 && nouns().len() > 400 && verbs().len() > 50);
        assert!(all.iter().all(|w| w.len() > 1 && w.bytes().all(|b| b.is_ascii_lowercase())));
    }
}
