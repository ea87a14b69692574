/* The guest's only program: fills memory with a pattern, touches pages of it at random for ever, and checks each.
 * It speaks to the first serial port through /dev/console, which is the kernel's. No C library, so that nothing but a
 * compiler is needed. */

typedef unsigned long u64;

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

enum {
    READ = 0, WRITE = 1, OPEN = 2, MMAP = 9, PWRITE = 18, PREAD = 17, CLONE = 56, FSYNC = 74, REBOOT = 169,
    MOUNT = 165, MKDIR = 83, SYSINFO = 99, NANOSLEEP = 35, SOCKET = 41, CONNECT = 42, ACCEPT = 43, BIND = 49,
    LISTEN = 50, IOCTL = 16
};

static u64 length(const char *text)
{
    u64 count = 0;
    while (text[count])
        count++;
    return count;
}

static void say(const char *text) { call(WRITE, 1, (long)text, length(text), 0, 0, 0); }

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

static char *copy(char *at, const char *text)
{
    while (*text)
        *at++ = *text++;
    return at;
}

static u64 mixed(u64 x)
{
    x ^= x >> 33;
    x *= 0xff51afd7ed558ccdUL;
    x ^= x >> 33;
    x *= 0xc4ceb9fe1a85ec53UL;
    return x ^ x >> 33;
}

/* Each thread has a part of the pages to itself, and remembers the version of each outside of them. */
struct part {
    u64 *pages, *versions, count, seed;
    volatile u64 touches, errors;
};

#define THREADS_MAX 8
static struct part parts[THREADS_MAX];
static char stacks[THREADS_MAX][16384] __attribute__((aligned(16)));

static void put(struct part *part, u64 page, u64 version)
{
    u64 *words = part->pages + page * 512;
    u64 word = mixed(part->seed + page * 0x9e3779b97f4a7c15UL + version);
    for (int i = 0; i < 512; i++)
        words[i] = word + i;
    part->versions[page] = version;
}

static void check(struct part *part, u64 page)
{
    u64 *words = part->pages + page * 512;
    u64 word = mixed(part->seed + page * 0x9e3779b97f4a7c15UL + part->versions[page]);
    for (int i = 0; i < 512; i++)
        if (words[i] != word + i) {
            part->errors++;
            return;
        }
}

static int work(void *of)
{
    struct part *part = of;
    u64 random = part->seed;
    for (;;) {
        random = mixed(random + 0x1234567);
        u64 page = random % part->count;
        check(part, page);
        put(part, page, part->versions[page] + 1);
        part->touches++;
    }
}

static u64 *map(u64 bytes)
{
    long at = call(MMAP, 0, bytes, 3, 0x22, -1, 0);
    if (at < 0 && at > -4096)
        say("no memory\n");
    return (u64 *)at;
}

/* A thread: memory, files and so on shared. */
static void thread(int (*run)(void *), void *argument, char *stack)
{
    u64 *top = (u64 *)(stack + 16384) - 2;
    top[0] = (u64)run;
    top[1] = (u64)argument;
    register long r10 __asm__("r10") = 0, r8 __asm__("r8") = 0;
    long result;
    __asm__ volatile("syscall\n\t"
                     "test %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "pop %%rax\n\t"
                     "pop %%rdi\n\t"
                     "call *%%rax\n\t"
                     "hlt\n\t"
                     "1:"
                     : "=a"(result)
                     : "a"(CLONE), "D"(0x10f00), "S"(top), "d"(0), "r"(r10), "r"(r8)
                     : "rcx", "r11", "memory");
}

static void nap(long milliseconds)
{
    long time[2] = {milliseconds / 1000, milliseconds % 1000 * 1000000};
    call(NANOSLEEP, (long)time, 0, 0, 0, 0, 0);
}

/* What is asked for on the kernel's command line comes as an environment: cpus=N and share=PERCENT. */
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

static void run(u64 *stack)
{
    char **environment = (char **)(stack + 1 + stack[0] + 1);
    u64 cpus = asked(environment, "cpus", 1), mib = asked(environment, "fill", 64);
    if (cpus > THREADS_MAX)
        cpus = THREADS_MAX;
    u64 count = mib * 256 / cpus;
    for (u64 i = 0; i < cpus; i++) {
        parts[i].count = count;
        parts[i].seed = mixed(i + 1);
        parts[i].pages = map(count * 4096);
        parts[i].versions = map(count * 8);
        for (u64 page = 0; page < count; page++)
            put(&parts[i], page, 0);
    }
    say("filled\n");
    for (u64 i = 0; i < cpus; i++)
        thread(work, &parts[i], stacks[i]);
    for (u64 tick = 1;; tick++) {
        nap(50);
        u64 touches = 0, errors = 0;
        for (u64 i = 0; i < cpus; i++)
            touches += parts[i].touches, errors += parts[i].errors;
        char line[128], *at = line;
        at = number(copy(at, "tick "), tick);
        at = number(copy(at, " touches "), touches);
        at = number(copy(at, " errors "), errors);
        *copy(at, "\n") = 0;
        say(line);
    }
}

__attribute__((used)) static void begin(u64 *stack) { run(stack); }

__asm__(".globl _start\n_start:\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall begin\n\thlt");
