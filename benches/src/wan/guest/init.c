/* The guest's only program: fills memory, then touches random pages of a hot set, a fifth of them writes, now and then one
 * somewhere cold, checks what it finds, and says so on the console after each so many touches: a sign of life. It keeps to
 * a pace, so that its speed is the same wherever it is not held up; it does not catch up. No C library, so that nothing
 * but a compiler is needed. */

typedef unsigned long u64;

enum { WRITE = 1, MMAP = 9, PAUSE = 34, CLOCK_GETTIME = 228, CLOCK_NANOSLEEP = 230 };

static long call(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

static void say(const char *text)
{
    u64 count = 0;
    while (text[count])
        count++;
    call(WRITE, 1, (long)text, count, 0, 0, 0);
}

static char *copy(char *at, const char *text)
{
    while (*text)
        *at++ = *text++;
    return at;
}

static char *number(char *at, u64 value)
{
    char digits[24];
    int count = 0;
    do
        digits[count++] = '0' + value % 10;
    while (value /= 10);
    while (count)
        *at++ = digits[--count];
    return at;
}

/* MurmurHash3's finalizer: every bit of the result depends on every bit of x. */
static u64 mixed(u64 x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdUL;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53UL;
    return x ^ x >> 33;
}

#define WORDS 512
#define STEP 0x9e3779b97f4a7c15UL

static u64 *pages;
static unsigned *versions;

static u64 first_word(u64 page) { return mixed(page * STEP + versions[page] + 1); }

static void put(u64 page)
{
    u64 *words = pages + page * WORDS, word = first_word(page);
    for (int i = 0; i < WORDS; i++, word += STEP)
        words[i] = word;
}

/* The first and the last word, and every 37th from one by chance on: all of them in the course of some touches. */
static u64 is_wrong(u64 page, u64 random)
{
    u64 *words = pages + page * WORDS, word = first_word(page);
    u64 wrong = (words[0] != word) | (words[WORDS - 1] != word + (WORDS - 1) * STEP);
    for (u64 i = random % 37; i < WORDS; i += 37)
        wrong |= words[i] != word + i * STEP;
    return wrong;
}

/* What is asked for on the kernel's command line comes as an environment. */
static u64 asked(char **environment, const char *name, u64 otherwise)
{
    for (; *environment; environment++) {
        const char *a = *environment, *b = name;
        while (*b && *a == *b)
            a++, b++;
        if (*b || *a++ != '=')
            continue;
        u64 value = 0;
        while (*a >= '0' && *a <= '9')
            value = value * 10 + *a++ - '0';
        return value;
    }
    return otherwise;
}

static void *map(u64 bytes)
{
    long at = call(MMAP, 0, bytes, 3, 0x22, -1, 0);
    if (at < 0 && at > -4096) {
        say("there is not enough memory to fill\n");
        for (;;)
            call(PAUSE, 0, 0, 0, 0, 0, 0);
    }
    return (void *)at;
}

static long now(void)
{
    long time[2];
    call(CLOCK_GETTIME, 1, (long)time, 0, 0, 0, 0);
    return time[0] * 1000000000 + time[1];
}

static void sleep_until(long at)
{
    long time[2] = {at / 1000000000, at % 1000000000};
    call(CLOCK_NANOSLEEP, 1, 1, (long)time, 0, 0, 0);
}

static void run(u64 *stack)
{
    char **environment = (char **)(stack + 1 + stack[0] + 1);
    u64 count = asked(environment, "fill_mib", 64) * 256, hot = asked(environment, "hot_mib", 16) * 256;
    u64 cold_per_million = asked(environment, "cold_per_million", 50);
    u64 tick_touches = asked(environment, "tick_touches", 1000), tick_ns = asked(environment, "tick_us", 10000) * 1000;
    /* The hot ones lie in the middle, where a push from either end comes late. */
    u64 first_hot = (count - hot) / 2;
    pages = map(count * 4096);
    versions = map(count * sizeof *versions);
    for (u64 page = 0; page < count; page++)
        put(page);
    say("filled\n");
    u64 random = 88172645463325252UL, touches = 0, errors = 0;
    long next = now();
    for (u64 tick = 1;; tick++) {
        for (u64 i = 0; i < tick_touches; i++) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            u64 draw = mixed(random);
            u64 page = draw % 1000000 < cold_per_million ? random % count : first_hot + random % hot;
            errors += is_wrong(page, draw >> 32);
            if ((draw >> 20) % 5 == 0) {
                versions[page]++;
                put(page);
            }
        }
        touches += tick_touches;
        char line[128], *at = line;
        at = number(copy(at, "tick "), tick);
        at = number(copy(at, " touches "), touches);
        at = number(copy(at, " errors "), errors);
        *copy(at, "\n") = 0;
        say(line);
        next += tick_ns;
        long late = now() - next;
        if (late > 0 || late < -(long)tick_ns)
            next += late;
        else
            sleep_until(next);
    }
}

__attribute__((used)) static void begin(u64 *stack) { run(stack); }

__asm__(".globl _start\n_start:\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall begin\n\thlt");
