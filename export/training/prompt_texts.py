"""Texts that prompts are made of. `prompts.fill` fills the slots."""

from __future__ import annotations


def _items(text: str) -> list[str]:
    return text.strip().replace("\n", "|").split("|")


TEMPLATES = {
    "explain": (
        "Explain {t} to a child.",
        "What is {t}? Explain it in simple words.",
        "Can you explain how {t} works, step by step?",
        "I never understood {t}. Please explain it with an everyday example.",
        "Describe {t} to someone who has never heard of it.",
        "Why is {t} important? Give {n} reasons.",
        "What is the difference between {t} and {u}?",
        "Define {t} and give {n} examples.",
        "Explain the connection between {t} and {u}.",
        "What are the most common misunderstandings about {t}?",
    ),
    "story": (
        "Write a short story about {t}.",
        "Tell me a story in which {name} discovers something surprising about {t}.",
        "Write the opening paragraph of a mystery novel about {t}.",
        "Write a bedtime story about {t} and {u}.",
        "Continue this story: {sentence}",
        "Write a funny story about {name}, who knows nothing about {t}.",
        "Write a fable about {t} that ends with a moral.",
        "Describe a day in the life of {name}, who works with {t}.",
    ),
    "list": (
        "List {n} facts about {t}.",
        "Give me {n} ideas for a project about {t}.",
        "Name {n} things everyone should know about {t}.",
        "Make a checklist for someone preparing for {t}.",
        "What are the top {n} mistakes people make with {t}?",
        "List {n} questions I could ask an expert on {t}.",
        "Suggest {n} titles for an article about {t} and {u}.",
        "What tools do I need for {t}? Make a bulleted list.",
    ),
    "advice": (
        "Give advice to someone who is new to {t}.",
        "How can I get better at {t}?",
        "My friend {name} is worried about {t}. What should I say?",
        "I have only {n} hours a week for {t}. How should I use them?",
        "What should I avoid when I deal with {t}?",
        "I am bored of {t}. What could I try instead?",
        "How do I convince my family that {t} matters?",
    ),
    "email": (
        "Write an email to a friend about {t}.",
        "Write a polite email to {name} asking for help with {t}.",
        "Write an email to my boss explaining that the report about {t} will be late.",
        "Write a letter of complaint to a company that sells things for {t}.",
        "Write a short thank-you note to {name} for the talk about {t}.",
        "Draft an invitation to an evening about {t} in {place}.",
        "Write a cover letter for a job that has to do with {t}.",
    ),
    "balance": (
        "What are the advantages and disadvantages of {t}?",
        "Compare {t} with {u}.",
        "Is {t} better than {u}? Give arguments for both sides.",
        "Should schools teach {t}? Discuss.",
        "Argue in favour of {t} in one paragraph, then argue against it.",
        "Which would you choose for a beginner, {t} or {u}, and why?",
    ),
    "code": (
        "Write a Python function related to {t} and explain it.",
        "Write a Python class that models {t} with two methods.",
        "Write a small program that asks the user {n} questions about {t}.",
        "How do I read a CSV file with data on {t} in Python?",
        "Write a JavaScript function that filters a list of {t} items by price.",
        "Write an SQL table for {t} and a query that counts its rows.",
        "Write an HTML page with a heading and a list about {t}.",
        "Explain what this code does: for i in range({n}): print(i * {a})",
        "Write a Python function that returns the {n} largest numbers of a list.",
        "Write a shell command that finds all files whose name contains the word {t}.",
        "Write a unit test for a function that adds {a} and {b}.",
    ),
    "history": (
        "Summarise the history of {t} in one paragraph.",
        "How has {t} changed over the last hundred years?",
        "Who were the people that made {t} what it is today?",
        "Write a timeline of {t} with {n} entries.",
        "What did people think about {t} in the past?",
    ),
    "dialogue": (
        "Write a dialogue between two people about {t}.",
        "Write a conversation between a teacher and {name} about {t}.",
        "Write a telephone call in which {name} orders something for {t}.",
        "Write an interview with an expert on {t}, with {n} questions and answers.",
        "Write a short play about {t} with three characters.",
    ),
    "how-to": (
        "How do I start learning about {t}?",
        "Write instructions in {n} steps for teaching {t} to a group.",
        "How can I earn money with {t}?",
        "What is the best way to remember facts about {t}?",
        "How do I organise a small event about {t} in {place}?",
        "Give me a recipe that makes one think of {t}.",
        "How do I explain {t} to my grandmother?",
    ),
    "product": (
        "Write a product description connected with {t}.",
        "Write an advertisement for a magazine about {t}.",
        "Write a review of a book about {t}.",
        "Write a short social media post about {t}.",
        "Invent a company that has to do with {t} and {u} and write its slogan and its mission.",
        "Write a headline and a news report about {t} in {place}.",
    ),
    "format": (
        "Make a JSON list of three things about {t} with keys name and reason.",
        "Make a table with two columns about {t}.",
        "Write a glossary of {n} words that are used in {t}.",
        "Give me an outline for an essay about {t} and {u}.",
        "Write a quiz about {t} with {n} questions and the answers at the end.",
        "Write a YAML file that describes {t}.",
        "Summarise {t} as {n} bullet points.",
    ),
    "poem": (
        "Write a poem about {t} and {u}.",
        "Write a haiku about {t}.",
        "Write a song with two verses and a chorus about {t}.",
        "Write a limerick about {name} and {t}.",
    ),
    "question": (
        "Answer as an expert: why does {t} matter?",
        "Tell me something surprising about {t}.",
        "What will {t} look like in fifty years?",
        "What does science say about {t}?",
        "How does {t} affect our daily life?",
        "Who invented {t}?",
        "In one sentence: what is {t}?",
        "What is {t} made of?",
        "Is {t} dangerous? Answer in two sentences.",
        "Which country is known for {t}?",
    ),
    "roleplay": (
        "You are a guide in a museum of {t}. Welcome the visitors.",
        "You are a detective who must solve a case about {t}. Describe the scene.",
        "Pretend you are {t}. Introduce yourself.",
        "You are a coach. Motivate {name} to go on with {t}.",
        "Act as a travel agent and plan {n} days in {place} for someone who loves {t}.",
    ),
    "edit": (
        "Rewrite this sentence in a formal style: {sentence}",
        "Correct the spelling and grammar of this sentence: {broken}",
        "Make this sentence shorter: {sentence}",
        "Turn this sentence into a question: {sentence}",
        "Explain the meaning of this sentence: {sentence}",
        "Write three other ways to say: {sentence}",
        "Translate this sentence into French: {sentence}",
        "Write the following sentence in the past tense: {sentence}",
    ),
    "summary": (
        "Summarise this paragraph in one sentence:\n\n{paragraph}",
        "Read the text and list its main points.\n\n{paragraph}",
        "{paragraph}\n\nWhat is this text about? Answer in two sentences.",
        "Rewrite this text for a child:\n\n{paragraph}",
        "Write a title for this text and explain your choice:\n\n{paragraph}",
        "Continue this text with another paragraph:\n\n{paragraph}",
    ),
    "maths": (
        "{name} has {a} apples and buys {b} more. How many apples does {name} have now?",
        "A train goes {a} kilometres in {n} hours. How fast is it? Show your steps.",
        "What is {a} plus {b}?",
        "A ticket for {t} costs {n} dollars. How much do {a} tickets cost?",
        "{name} shares {a} cards among {n} children. How many are left over? Explain.",
        "What is {n} percent of {a}?",
    ),
    "chat": (
        "Hi! How are you today?",
        "Hello, my name is {name}. What can you do for me?",
        "Good morning! I am going to {place} today. Any tips?",
        "I feel a little sad today because of {t}.",
        "Tell me a joke about {t}.",
        "What is your favourite thing about {t}?",
        "Thank you for your help with {t}!",
        "I am {name} from {place} and I like {t}. And you?",
        "Can you help me with something about {t}?",
    ),
    "plan": (
        "Make a plan for learning {t} in {n} weeks.",
        "Plan a day trip to {place} with a focus on {t}.",
        "Make a weekly schedule for someone who wants to improve at {t}.",
        "Plan a birthday party for {name} with the theme {t}.",
        "What goals should a club for {t} set itself this year?",
        "Write an agenda for a meeting about {t} and {u}.",
    ),
}

HELD_OUT = {
    "explain": ("How does {t} work? Please keep it simple.",),
    "story": ("Write a story about a girl named {name} and her love of {t}.",),
    "list": ("What are {n} good reasons to be interested in {t}?",),
    "advice": ("I want to know more about {t}. What do you recommend?",),
    "email": ("Write an email to {name} to tell the news about {t}.",),
    "code": ("Write Python code that stores data on {t} in a dictionary and prints it.",),
    "question": ("Why do so many people care about {t}?",),
    "edit": ("Improve the style of this sentence: {sentence}",),
    "chat": ("Hey, do you have a minute to talk about {t}?",),
    "plan": ("I have {n} days in {place}. What should I do there?",),
}

TOPICS = _items(
    """
rain|gardens|trains|bread|maps|clocks|bees|rivers|boats|music|chess|mountains|letters|markets
bicycles|winter|libraries|coffee|stars|bridges|horses|paint|wool|islands|salt|kites|farming|history
cities|computers|money|health|sleep|running|cooking|friendship|teaching|travel|weather|oceans
forests|robots|language|memory|games|birds|cats|dogs|fish|cars|houses|tools|books|films|sports
science|school|work|holidays|law|trade|energy|gravity|photosynthesis|the water cycle|volcanoes
earthquakes|the Moon|black holes|evolution|vaccines|antibiotics|DNA|the human heart|the brain
nutrition|yoga|meditation|swimming|football|tennis|basketball|hiking|camping|fishing|gardening
woodworking|knitting|pottery|photography|drawing|painting|sculpture|architecture|theatre|opera
jazz|the piano|the guitar|singing|dancing|poetry|novels|newspapers|radio|television|the internet
smartphones|artificial intelligence|machine learning|programming|databases|computer security
video games|board games|puzzles|magic tricks|philosophy|ethics|psychology|sociology|economics
inflation|taxes|saving money|the stock market|insurance|starting a business|marketing
customer service|leadership|teamwork|time management|public speaking|job interviews|negotiation
remote work|stress|happiness|courage|honesty|patience|kindness|anger|love|grief|loneliness
parenting|education|universities|homework|exams|learning languages|grammar|handwriting|translation
democracy|elections|human rights|the Roman Empire|ancient Egypt|the Middle Ages|the Renaissance
the Industrial Revolution|the French Revolution|space travel|the Olympic Games|museums|monuments
castles|lighthouses|harbours|airports|railways|roads|public transport|electric cars|solar power
wind turbines|nuclear power|batteries|recycling|plastic|climate change|biodiversity|rainforests
deserts|the Arctic|coral reefs|whales|elephants|wolves|butterflies|spiders|mushrooms|trees|flowers
tea|chocolate|cheese|rice|pizza|soup|spices|fruit|vegetables|breakfast|restaurants|fashion|shoes
furniture|glass|steel|concrete|paper|mathematics|statistics|geometry|probability|prime numbers
chemistry|physics|biology|astronomy|geology|medicine|nursing|dentistry|first aid|hospitals|ageing
"""
)

NAMES = _items(
    "Anna|Ben|Clara|David|Elena|Farid|Grace|Hugo|Ines|Jonas|Kofi|Lena|Maria|Noah|Olga|Priya"
)

PLACES = _items(
    "Paris|London|Rome|Berlin|a small village|New York|Tokyo|Cairo|Lisbon|the mountains|"
    "Mexico City|Istanbul|Prague|a quiet town by the sea|Chicago|Nairobi"
)

SENTENCES = (
    "The meeting was moved to Tuesday because the manager was ill.",
    "She opened the old box and found a letter with her own name on it.",
    "We are sorry to inform you that the shop will be closed next week.",
    "The children ran across the field until it became too dark to see.",
    "He could not remember where he had left the keys to the boat.",
    "Nobody expected that the small team would win the final game.",
    "The price of bread has gone up again, and people are not happy about it.",
    "Please send me the documents as soon as you can.",
    "After the storm the village was without electricity for three days.",
    "I think that your plan is good, but it will cost too much money.",
    "The new teacher explained the problem so well that everybody understood it.",
    "If it rains tomorrow, the concert will take place in the church.",
    "They walked along the river and talked about the years gone by.",
    "The report shows that sales were better in spring than in autumn.",
    "My grandfather repaired clocks in a small room behind the kitchen.",
    "The museum offers free tours on the first Sunday of every month.",
    "A strange light appeared above the hills shortly after midnight.",
    "You should drink enough water when you work in the sun.",
    "The train from the north arrived two hours late.",
    "Learning a language takes time, but it opens many doors.",
)

BROKEN = (
    "She dont like the weather their, it are to cold.",
    "Me and my brother was going too the market yesterday.",
    "The informations you send me was very usefull.",
    "He have forget his book on the tabel again.",
    "I has been living hear since five year.",
    "Their is many people which wants to learn english.",
    "Yesterday we goes to the cinema and seen a good film.",
    "If I would have more time, I will visits you more oftenly.",
)

PARAGRAPHS = (
    "The old mill stands at the edge of the village, where the river bends to the east. For two "
    "hundred years farmers brought their grain here. When the railway came, a larger mill was "
    "built near the station, and the old one fell silent. Today it is a small museum that is run "
    "by volunteers and opens on weekends.",
    "Bees visit flowers to collect nectar and pollen. While they do so, they carry pollen from one "
    "plant to the next, and many plants can form seeds only because of this. Farmers know how much "
    "they depend on it: without bees the harvest of apples, almonds and many other crops would be "
    "far smaller.",
    "The company sold fewer machines last year than the year before. Costs for energy and steel "
    "rose sharply, and two important customers cancelled their orders. The management wants to "
    "close one of its five plants and to invest the money in a new line of smaller machines.",
    "Sleep is not a waste of time. During the night the brain sorts what it has learned, and the "
    "body repairs itself. People who sleep too little become ill more often, make more mistakes "
    "and are in a worse mood. Most adults need between seven and nine hours.",
    "Lena had never been at sea before. On the first day she was ill, on the second she was "
    "afraid, and on the third she stood at the bow and laughed into the wind. When the ship "
    "reached the harbour a week later, she did not want to leave it.",
    "Paper was invented in China about two thousand years ago. It was made of bark, rags and old "
    "nets. The craft reached the Arab world in the eighth century and Europe a few hundred years "
    "later. Before that, people there wrote on parchment, which was made of animal skin and was "
    "very expensive.",
    "The city plans to close the main street to cars. Shop owners fear that they will lose "
    "customers, while many residents hope for cleaner air and less noise. In other cities trade "
    "grew after such a change, but it took several years.",
    "To make the dough, mix flour, water, salt and a little yeast. Knead it for ten minutes and "
    "let it rest in a warm place until it has doubled in size. Shape it into a loaf, let it rest "
    "again for half an hour, and bake it in a hot oven until the crust is brown.",
    "A battery stores energy in chemical form. When it is connected to a lamp, a reaction inside "
    "sets electrons free, and they flow through the wire as a current. In a rechargeable battery "
    "the reaction can be reversed by a current in the other direction.",
    "Dear members, our library will be renovated from March to June. During this time you can "
    "borrow books in the old school building. The opening hours stay the same. Please return all "
    "books that you have at home before the end of February.",
    "Wolves live in packs with a clear order. They hunt together and share what they catch. In "
    "many regions they had disappeared for more than a century. Now they return, and shepherds "
    "protect their animals with fences and dogs.",
    "The first computers filled whole rooms and had less power than a modern watch. They were "
    "used for calculations in science and in the army. With the invention of the transistor they "
    "became smaller, cheaper and more reliable, and in the end everybody could own one.",
)
