//! Small talk and simple facts: what the model knows beside its problems.

use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha8Rng;

/// A kind of fact: how one asks, how one answers (`{0}` is asked for, `{1}` is told), and the facts.
struct Facts {
    questions: &'static [&'static str],
    reply: &'static str,
    pairs: &'static [(&'static str, &'static str)],
}

/// A question and its reply.
pub fn exchange(rng: &mut ChaCha8Rng) -> (String, String) {
    match rng.random_range(0..10) {
        0..=1 => {
            let (questions, replies) = CHAT.choose(rng).expect("chat");
            (pick(rng, questions), pick(rng, replies))
        }
        2 => {
            let word = FACTS.choose(rng).and_then(|facts| facts.pairs.choose(rng)).expect("words").0;
            match rng.random_range(0..3) {
                0 => (format!("Repeat after me: {word}."), format!("{}.", capitalised(word))),
                1 => (format!("Say {word} twice."), format!("{}, {word}.", capitalised(word))),
                _ => (format!("Say {word} three times."), format!("{}, {word}, {word}.", capitalised(word))),
            }
        }
        _ => {
            let facts = FACTS.choose(rng).expect("facts");
            let (asked, told) = facts.pairs.choose(rng).expect("pairs");
            let reply = facts.reply.replace("{0}", asked).replace("{1}", told);
            (pick(rng, facts.questions).replace("{0}", asked), capitalised(&reply))
        }
    }
}

fn pick(rng: &mut ChaCha8Rng, from: &[&str]) -> String {
    (*from.choose(rng).expect("a choice")).to_owned()
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

type Chat = (&'static [&'static str], &'static [&'static str]);

const CHAT: &[Chat] = &[
    (
        &["Hello!", "Hi!", "Hello", "Hi there!", "Good morning!", "Good evening!", "Hey!"],
        &["Hello! How can I help you?", "Hi! What would you like to know?", "Hello! Nice to meet you."],
    ),
    (
        &["How are you?", "Hello! How are you?", "How are you today?", "How do you do?"],
        &["I am fine, thank you. How can I help you?", "I am well, thank you. And you?"],
    ),
    (
        &["Who are you?", "What are you?", "What is your name?", "Tell me about yourself."],
        &[
            "I am a tiny language model, trained with Ferrotune.",
            "I am a very small model. Ferrotune trained me.",
        ],
    ),
    (
        &["What can you do?", "How can you help me?", "What do you know?"],
        &[
            "I can solve small problems and answer simple questions.",
            "I know numbers, letters and a few facts.",
        ],
    ),
    (
        &["Thank you!", "Thanks!", "Thank you very much.", "That was helpful."],
        &["You are welcome!", "You are welcome. Is there anything else?", "With pleasure!"],
    ),
    (
        &["Goodbye!", "Bye!", "See you later.", "Good night!"],
        &["Goodbye! Have a nice day.", "Goodbye! See you soon."],
    ),
    (
        &["Tell me a story.", "Tell me something.", "Tell me a short story."],
        &[
            "A small cat found a warm coat and slept on it all day.",
            "A boy planted a seed. In summer it was a tall flower.",
            "A bird saw the sea for the first time and sang until night.",
        ],
    ),
    (&["Are you a human?", "Are you a person?"], &["No, I am a small language model.", "No, I am a model."]),
    (&["I am sad.", "I had a bad day.", "I am tired."], &["I am sorry to hear that. Can I help you?"]),
    (&["I am happy!", "I had a good day."], &["That is good to hear!", "I am glad to hear that."]),
    (&["How many days are in a week?"], &["There are seven days in a week."]),
    (&["How many months are in a year?"], &["There are twelve months in a year."]),
    (&["How many letters are in the alphabet?"], &["There are 26 letters in the alphabet."]),
];

const FACTS: &[Facts] = &[
    Facts {
        questions: &[
            "What is the opposite of {0}?",
            "Tell me the opposite of {0}.",
            "What is the contrary of {0}?",
            "{0} is the opposite of what?",
        ],
        reply: "the opposite of {0} is {1}.",
        pairs: &[
            ("hot", "cold"),
            ("cold", "hot"),
            ("big", "small"),
            ("small", "big"),
            ("old", "young"),
            ("young", "old"),
            ("fast", "slow"),
            ("slow", "fast"),
            ("up", "down"),
            ("down", "up"),
            ("left", "right"),
            ("right", "left"),
            ("light", "dark"),
            ("dark", "light"),
            ("day", "night"),
            ("night", "day"),
            ("open", "closed"),
            ("full", "empty"),
            ("empty", "full"),
            ("rich", "poor"),
            ("poor", "rich"),
            ("wet", "dry"),
            ("dry", "wet"),
            ("hard", "soft"),
            ("soft", "hard"),
            ("high", "low"),
            ("low", "high"),
            ("long", "short"),
            ("short", "long"),
            ("good", "bad"),
            ("bad", "good"),
            ("happy", "sad"),
            ("sad", "happy"),
            ("strong", "weak"),
            ("weak", "strong"),
            ("early", "late"),
            ("late", "early"),
            ("loud", "quiet"),
            ("quiet", "loud"),
            ("black", "white"),
            ("white", "black"),
        ],
    },
    Facts {
        questions: &["What is the plural of {0}?", "Give me the plural of {0}.", "One {0}, two what?"],
        reply: "the plural of {0} is {1}.",
        pairs: &[
            ("cat", "cats"),
            ("dog", "dogs"),
            ("book", "books"),
            ("tree", "trees"),
            ("house", "houses"),
            ("car", "cars"),
            ("flower", "flowers"),
            ("bird", "birds"),
            ("box", "boxes"),
            ("glass", "glasses"),
            ("bus", "buses"),
            ("dish", "dishes"),
            ("city", "cities"),
            ("baby", "babies"),
            ("story", "stories"),
            ("leaf", "leaves"),
            ("knife", "knives"),
            ("wolf", "wolves"),
            ("man", "men"),
            ("woman", "women"),
            ("child", "children"),
            ("foot", "feet"),
            ("tooth", "teeth"),
            ("mouse", "mice"),
            ("goose", "geese"),
            ("sheep", "sheep"),
            ("fish", "fish"),
        ],
    },
    Facts {
        questions: &["What colour is {0}?", "Which colour has {0}?", "Tell me the colour of {0}."],
        reply: "{0} is {1}.",
        pairs: &[
            ("grass", "green"),
            ("snow", "white"),
            ("the sky", "blue"),
            ("the sea", "blue"),
            ("the sun", "yellow"),
            ("coal", "black"),
            ("blood", "red"),
            ("a tomato", "red"),
            ("a banana", "yellow"),
            ("a lemon", "yellow"),
            ("a carrot", "orange"),
            ("a frog", "green"),
            ("milk", "white"),
            ("chocolate", "brown"),
            ("a cherry", "red"),
            ("an elephant", "grey"),
            ("a raven", "black"),
            ("a swan", "white"),
            ("a plum", "purple"),
            ("sand", "yellow"),
            ("a flamingo", "pink"),
            ("a mouse", "grey"),
        ],
    },
    Facts {
        questions: &[
            "What is the capital of {0}?",
            "Name the capital of {0}.",
            "Which city is the capital of {0}?",
        ],
        reply: "the capital of {0} is {1}.",
        pairs: &[
            ("France", "Paris"),
            ("Germany", "Berlin"),
            ("Italy", "Rome"),
            ("Spain", "Madrid"),
            ("Portugal", "Lisbon"),
            ("England", "London"),
            ("Ireland", "Dublin"),
            ("Norway", "Oslo"),
            ("Sweden", "Stockholm"),
            ("Finland", "Helsinki"),
            ("Denmark", "Copenhagen"),
            ("Poland", "Warsaw"),
            ("Austria", "Vienna"),
            ("Greece", "Athens"),
            ("Hungary", "Budapest"),
            ("Japan", "Tokyo"),
            ("China", "Beijing"),
            ("Egypt", "Cairo"),
            ("Kenya", "Nairobi"),
            ("Peru", "Lima"),
            ("Cuba", "Havana"),
            ("Canada", "Ottawa"),
        ],
    },
    Facts {
        questions: &["What sound does a {0} make?", "What does a {0} say?"],
        reply: "a {0} says {1}.",
        pairs: &[
            ("cow", "moo"),
            ("dog", "woof"),
            ("cat", "meow"),
            ("duck", "quack"),
            ("sheep", "baa"),
            ("pig", "oink"),
            ("bee", "buzz"),
            ("lion", "roar"),
            ("frog", "croak"),
            ("snake", "hiss"),
            ("mouse", "squeak"),
            ("horse", "neigh"),
            ("bird", "tweet"),
        ],
    },
    Facts {
        questions: &["What is a young {0} called?", "How do you call a baby {0}?"],
        reply: "a young {0} is called a {1}.",
        pairs: &[
            ("dog", "puppy"),
            ("cat", "kitten"),
            ("cow", "calf"),
            ("horse", "foal"),
            ("sheep", "lamb"),
            ("pig", "piglet"),
            ("hen", "chick"),
            ("duck", "duckling"),
            ("lion", "cub"),
            ("goat", "kid"),
            ("frog", "tadpole"),
        ],
    },
    Facts {
        questions: &["What is a {0}?", "What kind of thing is a {0}?", "Do you know what a {0} is?"],
        reply: "a {0} is {1}.",
        pairs: &[
            ("rose", "a flower"),
            ("tulip", "a flower"),
            ("dog", "an animal"),
            ("cat", "an animal"),
            ("horse", "an animal"),
            ("hammer", "a tool"),
            ("saw", "a tool"),
            ("violin", "an instrument"),
            ("piano", "an instrument"),
            ("pear", "a fruit"),
            ("plum", "a fruit"),
            ("carrot", "a vegetable"),
            ("car", "a vehicle"),
            ("train", "a vehicle"),
            ("robin", "a bird"),
            ("shark", "a fish"),
            ("chair", "a piece of furniture"),
            ("triangle", "a shape with three sides"),
            ("square", "a shape with four sides"),
            ("forge", "a place where metal is shaped"),
        ],
    },
    Facts {
        questions: &["What is the past tense of {0}?", "Today I {0}. What did I do yesterday?"],
        reply: "the past tense of {0} is {1}.",
        pairs: &[
            ("go", "went"),
            ("see", "saw"),
            ("eat", "ate"),
            ("run", "ran"),
            ("come", "came"),
            ("take", "took"),
            ("give", "gave"),
            ("sing", "sang"),
            ("drink", "drank"),
            ("write", "wrote"),
            ("walk", "walked"),
            ("play", "played"),
            ("talk", "talked"),
            ("jump", "jumped"),
            ("bring", "brought"),
            ("buy", "bought"),
        ],
    },
];
