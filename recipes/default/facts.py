"""Words and small facts that the templates of the small talk are filled with."""

from __future__ import annotations

# What someone may want, as (verbs and object in the request, what a tool for it would do).
SERVICES = (
    (("book a table at {place} for {n} people", "find me a good restaurant in {city}", "reserve a table for tonight",
      "find an Italian restaurant in {city}", "get me a table for {n} tonight"), "restaurants"),
    (("book a hotel in {city}", "find a hotel in {city} for {n} nights", "reserve a hotel room in {city}",
      "get me a cheap hotel in {city}"), "hotels"),
    (("book a flight to {city}", "find a flight from {city} to {city2}", "buy a plane ticket to {city}",
      "find me a cheap flight to {city} next week"), "flights"),
    (("buy a bus ticket to {city}", "find a bus from {city} to {city2}", "find me a bus to {city}"), "buses"),
    (("buy a train ticket to {city}", "find a train to {city}", "check when the next train to {city} leaves"), "trains"),
    (("call me a taxi", "get me a cab to the station", "order a ride to the airport", "book a ride to {place}"), "rides"),
    (("rent a car in {city}", "find a rental car for {n} days", "book a car in {city}"), "rental cars"),
    (("find a film to watch tonight", "buy {n} cinema tickets", "book tickets for a movie in {city}"), "films"),
    (("find a concert in {city}", "buy {n} tickets for a concert", "find events in {city} this weekend"), "events"),
    (("play some music", "play a song by Mozart", "put on some jazz"), "music"),
    (("set an alarm for {n} o'clock", "wake me up at {n}", "set a timer for {n} minutes"), "alarms and timers"),
    (("send an email to my boss", "write an email to Anna and send it", "check my email"), "email"),
    (("transfer {n} dollars to Tom", "check my bank balance", "send {n} dollars to my sister"), "bank accounts"),
    (("add a meeting to my calendar", "check my calendar", "put an appointment in my calendar"), "calendars"),
    (("find me a dentist in {city}", "book an appointment with a doctor", "find a hair salon in {city}"), "appointments"),
    (("order a pizza", "order {n} coffees", "order some food"), "orders of food and drinks"),
    (("find an apartment in {city}", "find a flat with {n} rooms"), "apartments"),
    (("call my mother", "phone the office", "send a message to Tom"), "calls and messages"),
    (("turn off the lights", "turn on the heating", "open the garage door"), "devices in the house"),
    (("buy new shoes for me", "order a book for me", "order a birthday present"), "shopping"),
    (("open a file on my computer", "delete my old photos", "print this page"), "files"),
)  # fmt: skip
REQUESTS = (
    "Can you {x}?", "Could you {x}?", "Please {x}.", "I want you to {x}.", "I need you to {x}.", "{x}", "Could you please {x}?",
    "Hi, can you {x}?", "I'd like you to {x}.", "Help me {x}.", "Hey, please {x}", "Would you {x}?", "Can you {x} for me?",
)  # fmt: skip
NO_TOOL = (
    "I'm sorry, I have no tool for {s} here, so I can't do that. If you connect one, I will gladly help.",
    "I can't do that, because I was given no tool for {s}.",
    "I would like to help, but I have no tool for {s}. Is there something else I can do?",
)
CITIES = (
    "Paris", "London", "New York", "Berlin", "Rome", "Chicago", "Boston", "Seattle", "Madrid", "Tokyo", "Vienna", "Oslo",
    "San Francisco", "Sydney", "Dublin", "Toronto", "Lisbon", "Prague", "Denver", "Athens", "Cairo", "Mumbai",
)  # fmt: skip
PLACES = ("Luigi's", "the Golden Lion", "Chez Marie", "the Blue Door", "Mario's", "Sakura", "the Old Mill", "Green Garden")
NAMES = (
    "Anna", "Tom", "Maria", "Peter", "Sara", "Ben", "Lena", "Jack", "Amina", "Ravi", "Mei", "Carlos", "Emma", "Noah", "Olga",
    "Ali", "Kate", "Sam", "Lucy", "Max", "Nina", "Paul", "Zoe", "Ivan", "Grace", "Leo", "Fatima", "David", "Julia", "Kofi",
    "Hannah", "Omar", "Ella", "Felix", "Priya", "George", "Mary", "Luis", "Rosa", "Henry", "Ida", "Jonas", "Clara", "Yusuf",
)  # fmt: skip
# (kind of thing, things)
FAVOURITES = (
    (("colour", "color"), ("blue", "red", "green", "yellow", "purple", "orange", "black", "white", "pink")),
    (("food",), ("pizza", "rice", "soup", "pasta", "curry", "salad", "chocolate", "bread", "cheese", "noodles")),
    (("animal",), ("the cat", "the dog", "the horse", "the owl", "the fox", "the elephant", "the whale", "the bear")),
    (("season",), ("spring", "summer", "autumn", "winter")),
    (("sport",), ("football", "tennis", "swimming", "running", "chess", "basketball", "cycling")),
    (("city",), CITIES),
    (("fruit",), ("the apple", "the banana", "the cherry", "the mango", "the pear", "the orange")),
    (("number",), ("7", "3", "12", "42", "9", "100")),
)  # fmt: skip
# (what a user tells, what can be said to it, things)
STATEMENTS = (
    (("I like {x}.", "I love {x}!", "I really like {x}.", "I enjoy {x}.", "My hobby is {x}."),
     ("That sounds nice! What do you like most about {x}?", "Oh, {x}! Have you liked it for a long time?"),
     ("reading", "swimming", "cooking", "dancing", "music", "football", "gardening", "chess", "painting", "hiking", "singing",
      "cycling", "fishing", "running", "travelling", "knitting", "tennis", "photography")),
    (("I am from {x}.", "I live in {x}.", "I come from {x}.", "I was born in {x}."),
     ("How nice! What do you like about {x}?", "I have read about {x}. How is life there?"), CITIES),
    (("I am a {x}.", "I work as a {x}.", "My job is being a {x}.", "I'm a {x}, by the way."),
     ("That sounds like interesting work! Do you like being a {x}?", "A {x}! What does your day look like?"),
     ("teacher", "nurse", "farmer", "student", "doctor", "driver", "cook", "baker", "gardener", "programmer", "painter", "writer",
      "shop assistant", "carpenter", "librarian")),
    (("I have {x}.", "I've got {x}."), ("How nice! Tell me a little about it.", "That is nice. I'm glad to hear it."),
     ("two brothers", "a sister", "a big family", "three children", "a new bicycle", "a garden", "a little boat", "a new flat",
      "a good friend", "a lot of books")),
    (("I went to {x} today.", "Yesterday I went to {x}.", "I was at {x} this morning.", "We visited {x} last week."),
     ("That sounds nice! What did you do there?", "How was it? I hope you had a good time."),
     ("the park", "the zoo", "the beach", "the market", "the museum", "school", "my grandmother's house", "the lake", "the forest",
      "a party", "the library", "the mountains")),
    (("I am learning {x}.", "I'm trying to learn {x}.", "I want to learn {x}."),
     ("Good luck with it! A little practice each day helps.", "That is a good plan. Take it step by step."),
     ("English", "French", "the piano", "the guitar", "to cook", "to swim", "to drive", "Spanish", "to draw", "chess", "to code")),
    (("I will {x} tomorrow.", "I'm going to {x} this weekend.", "Next week I will {x}."),
     ("That sounds good. Have fun!", "How nice! I hope it goes well."),
     ("visit my parents", "go to the sea", "paint my room", "bake a cake", "meet my friends", "run a race", "see my sister",
      "start a new job", "go camping", "play football")),
)  # fmt: skip
PETS = ("dog", "cat", "horse", "rabbit", "parrot", "hamster")
PET_NAMES = ("Max", "Bella", "Rex", "Luna", "Milo", "Coco", "Buddy", "Daisy", "Oscar", "Molly", "Rocky", "Simba")

SOUNDS = {
    "cow": "moo", "dog": "woof", "cat": "meow", "duck": "quack", "sheep": "baa", "pig": "oink", "horse": "neigh",
    "lion": "roar", "owl": "hoot", "bee": "buzz", "frog": "croak", "snake": "hiss", "hen": "cluck", "mouse": "squeak",
}  # fmt: skip
YOUNG = {
    "dog": "puppy", "cat": "kitten", "cow": "calf", "horse": "foal", "sheep": "lamb", "goat": "kid", "hen": "chick",
    "duck": "duckling", "pig": "piglet", "lion": "cub", "bear": "cub", "frog": "tadpole", "kangaroo": "joey", "goose": "gosling",
    "swan": "cygnet", "deer": "fawn", "elephant": "calf", "whale": "calf", "owl": "owlet", "fox": "cub",
}  # fmt: skip
LEGS = {
    "dog": 4, "cat": 4, "horse": 4, "spider": 8, "bird": 2, "ant": 6, "bee": 6, "cow": 4, "snake": 0, "fish": 0, "hen": 2,
    "fly": 6, "elephant": 4, "duck": 2, "crab": 10, "butterfly": 6, "person": 2, "mouse": 4, "beetle": 6,
}  # fmt: skip
COLOURS = {
    "the sky": "blue", "grass": "green", "snow": "white", "blood": "red", "a banana": "yellow", "coal": "black",
    "a lemon": "yellow", "milk": "white", "a tomato": "red", "an orange": "orange", "a frog": "green", "a crow": "black",
    "the sun": "yellow", "chocolate": "brown", "a carrot": "orange", "a cucumber": "green", "a polar bear": "white",
}  # fmt: skip
OPPOSITES = {
    "hot": "cold", "big": "small", "fast": "slow", "good": "bad", "up": "down", "day": "night", "happy": "sad", "old": "new",
    "young": "old", "open": "closed", "full": "empty", "left": "right", "light": "dark", "rich": "poor", "wet": "dry",
    "high": "low", "long": "short", "hard": "soft", "early": "late", "loud": "quiet", "strong": "weak", "true": "false",
    "clean": "dirty", "love": "hate", "war": "peace", "black": "white", "near": "far", "thick": "thin", "first": "last",
    "easy": "difficult", "inside": "outside", "begin": "end", "push": "pull", "win": "lose", "buy": "sell", "sweet": "sour",
}  # fmt: skip
MORE_GROUPS = {
    "animals": ("a dog", "a cat", "a horse", "an elephant", "a fox", "a bear", "a mouse", "an owl", "a lion", "a whale"),
    "fruits": ("apples", "bananas", "pears", "cherries", "oranges", "grapes", "mangoes", "plums"),
    "colours": ("red", "blue", "green", "yellow", "purple", "orange", "white", "black"),
    "vegetables": ("carrots", "potatoes", "tomatoes", "onions", "peas", "beans", "spinach", "cucumbers"),
    "countries": ("France", "Japan", "Brazil", "Kenya", "Canada", "India", "Norway", "Australia", "Egypt", "Peru"),
    "planets": ("Mars", "Venus", "Jupiter", "Saturn", "Mercury", "Neptune", "Uranus", "Earth"),
    "birds": ("the godwit", "the owl", "the eagle", "the crow", "the sparrow", "the duck", "the swan", "the parrot"),
    "trees": ("the oak", "the pine", "the birch", "the palm", "the willow", "the apple tree"),
    "cities": ("Paris", "London", "Tokyo", "Rome", "Cairo", "New York", "Sydney", "Berlin"),
    "musical instruments": ("the piano", "the violin", "the flute", "the drum", "the guitar", "the trumpet"),
    "sports": ("football", "tennis", "swimming", "basketball", "running", "skiing"),
    "drinks": ("water", "tea", "coffee", "milk", "orange juice", "lemonade"),
}  # fmt: skip
PLAIN_QA = (
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("How many hours are in a day?", "A day has 24 hours."),
    ("How many minutes are in an hour?", "An hour has 60 minutes."),
    ("How many seconds are in a minute?", "A minute has 60 seconds."),
    ("How many days are in a year?", "A year has 365 days, and a leap year has 366."),
    ("How many seasons are there?", "There are four seasons: spring, summer, autumn and winter."),
    ("What are the days of the week?", "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday."),
    ("Name the months of the year.", "January, February, March, April, May, June, July, August, September, October, "
     "November and December."),
    ("What are the four seasons?", "The four seasons are spring, summer, autumn and winter."),
    ("What are the colours of the rainbow?", "Red, orange, yellow, green, blue, indigo and violet."),
    ("What is the biggest animal?", "The blue whale is the biggest animal."),
    ("What is the tallest animal?", "The giraffe is the tallest animal."),
    ("What is the fastest animal on land?", "The cheetah is the fastest animal on land."),
    ("What is the biggest planet?", "Jupiter is the biggest planet of our solar system."),
    ("Which planet is closest to the sun?", "Mercury is the planet closest to the sun."),
    ("What planet do we live on?", "We live on the planet Earth."),
    ("How many planets are there?", "There are eight planets in our solar system."),
    ("What is the tallest mountain in the world?", "Mount Everest is the tallest mountain in the world."),
    ("What is the biggest ocean?", "The Pacific is the biggest ocean."),
    ("How many continents are there?", "There are seven continents."),
    ("What do bees make?", "Bees make honey."),
    ("What do cows eat?", "Cows eat mostly grass."),
    ("What do plants need to grow?", "Plants need light, water, air and good soil."),
    ("Why is the sky blue?", "The air scatters the blue part of the sunlight more than the red part, so the sky looks blue."),
    ("Why do we sleep?", "Sleep gives the body and the brain time to rest and to repair themselves."),
    ("Why does it rain?", "Water rises into the air, cools down in the clouds and falls down again as drops."),
    ("Is the earth round?", "Yes, the earth is round like a ball, a little flat at the poles."),
    ("Is fire hot?", "Yes, fire is very hot."),
    ("Is ice cold?", "Yes, ice is cold: it is frozen water."),
    ("What is ice made of?", "Ice is frozen water."),
    ("At what temperature does water boil?", "Water boils at 100 degrees Celsius, which is 212 degrees Fahrenheit."),
    ("At what temperature does water freeze?", "Water freezes at 0 degrees Celsius, which is 32 degrees Fahrenheit."),
    ("What is the sun?", "The sun is a star. It gives us light and warmth."),
    ("What is the moon?", "The moon is a ball of rock that goes around the earth."),
    ("Can fish fly?", "Most fish cannot fly, but flying fish can glide over the water for a short way."),
    ("Can birds fly?", "Most birds can fly, but some, such as penguins, cannot."),
    ("Can penguins fly?", "No, penguins cannot fly, but they swim very well."),
    ("Is a whale a fish?", "No, a whale is a mammal: it breathes air and feeds its young with milk."),
    ("Is a spider an insect?", "No, a spider is not an insect. It has eight legs, and insects have six."),
    ("Who wrote Romeo and Juliet?", "William Shakespeare wrote \"Romeo and Juliet\"."),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("Who was the first man on the moon?", "Neil Armstrong was the first man on the moon, in 1969."),
    ("Who invented the telephone?", "Alexander Graham Bell is known as the inventor of the telephone."),
    ("How many letters are in the alphabet?", "The English alphabet has 26 letters."),
    ("What is the first letter of the alphabet?", "The first letter of the alphabet is A."),
    ("What is a dog?", "A dog is an animal that many people keep as a pet. Dogs are known to be loyal friends."),
    ("What is a cat?", "A cat is a small animal with soft fur that many people keep as a pet."),
    ("What is water?", "Water is a clear liquid that all living things need."),
    ("What is love?", "Love is a deep feeling of care for someone."),
    ("What is a computer?", "A computer is a machine that follows instructions to work with information."),
    ("What is a language model?", "A language model is a program that has learned from texts which words follow which, and "
     "so can write."),
    ("What is the meaning of life?", "People give many answers. For some it is to love and to be useful to others."),
    ("What is the biggest country?", "Russia is the biggest country in the world by area."),
    ("What is the smallest country?", "Vatican City is the smallest country in the world."),
    ("What is the longest river?", "The Nile is usually called the longest river in the world."),
    ("How many legs does a chair have?", "Most chairs have four legs."),
    ("Which is heavier, a kilo of feathers or a kilo of iron?", "They weigh the same: one kilo."),
    ("Do fish live in water?", "Yes, fish live in water."),
    ("Where do camels live?", "Camels live in deserts."),
    ("Where do penguins live?", "Most penguins live in the cold south, around Antarctica."),
    ("What do caterpillars turn into?", "Caterpillars turn into butterflies or moths."),
    ("How do I boil an egg?", "Put the egg into boiling water. After about six minutes it is soft, after ten it is hard."),
    ("How do I make tea?", "Boil water, pour it over the tea, wait three to five minutes and take the tea out."),
    ("How can I sleep better?", "Go to bed at the same time each day, keep the room dark and quiet, and put your phone away."),
    ("How do I make new friends?", "Go where people share your interests, be friendly, listen well and be patient."),
    ("How can I learn English?", "Read easy books, listen every day, learn a few words a day and speak as often as you can."),
    ("Give me a tip for a job interview.", "Learn about the company first, come on time and give short, honest answers."),
)  # fmt: skip
