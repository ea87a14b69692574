/* The guest's only program: fills memory with a pattern, touches pages of it at random for ever, and checks each. With
 * load=1 on the kernel's command line it uses a disk and the network as well, and checks what these give back.
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
    READ = 0, WRITE = 1, OPEN = 2, CLOSE = 3, MMAP = 9, IOCTL = 16, PREAD = 17, PWRITE = 18, NANOSLEEP = 35, SOCKET = 41,
    CONNECT = 42, ACCEPT = 43, SENDTO = 44, RECVFROM = 45, BIND = 49, LISTEN = 50, SETSOCKOPT = 54, CLONE = 56,
    FSYNC = 74, MOUNT = 165, FINIT_MODULE = 313
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

/* What is asked for on the kernel's command line comes as an environment: cpus=N, fill=MIB and load=1. */
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

/* What a part of the load has done, and what of it was wrong. */
struct tally {
    volatile u64 done, errors;
};

static struct tally disk, tcp, net;
static volatile u64 net_lost;

/* The drivers, in the order of their names. */
static void load_modules(void)
{
    char path[] = "/modules/00";
    for (int i = 0; i < 100; i++) {
        path[9] = '0' + i / 10;
        path[10] = '0' + i % 10;
        long file = call(OPEN, (long)path, 0, 0, 0, 0, 0);
        if (file < 0)
            return;
        if (call(FINIT_MODULE, file, (long)"", 0, 0, 0, 0) < 0)
            say("a module is not taken\n");
        call(CLOSE, file, 0, 0, 0, 0, 0);
    }
}

/* Two threads write and read back 8 MiB each of /dev/vda, past the guest's page cache. */
enum { DISK_THREADS = 2, DISK_BLOCKS = 2048, O_RDWR_DIRECT = 2 | 040000 };

static void disk_block(u64 *words, u64 block, u64 version)
{
    u64 word = mixed(block * 0x9e3779b97f4a7c15UL + version);
    for (int i = 0; i < 512; i++)
        words[i] = word + i;
}

static int use_disk(void *of)
{
    u64 first = (u64)of * DISK_BLOCKS, random = mixed(first + 77);
    u64 *versions = map(DISK_BLOCKS * 8), *expected = map(4096), *buffer = map(4096);
    long file;
    while ((file = call(OPEN, (long)"/dev/vda", O_RDWR_DIRECT, 0, 0, 0, 0)) < 0)
        nap(10);
    for (u64 turn = 1;; turn++) {
        random = mixed(random + 0x1234567);
        u64 number = random % DISK_BLOCKS, at = (first + number) * 4096;
        int wrong = 0;
        if (versions[number]) {
            wrong = call(PREAD, file, (long)buffer, 4096, at, 0, 0) != 4096;
            disk_block(expected, first + number, versions[number]);
            for (int i = 0; i < 512; i++)
                wrong |= buffer[i] != expected[i];
        }
        disk_block(buffer, first + number, ++versions[number]);
        wrong |= call(PWRITE, file, (long)buffer, 4096, at, 0, 0) != 4096;
        if (turn % 64 == 0)
            wrong |= call(FSYNC, file, 0, 0, 0, 0, 0) != 0;
        __atomic_add_fetch(&disk.errors, wrong, __ATOMIC_RELAXED);
        __atomic_add_fetch(&disk.done, 1, __ATOMIC_RELAXED);
        nap(1);
    }
}

struct address {
    unsigned short family, port;
    unsigned int ip;
    char rest[8];
};

/* Both are as they come on the wire. */
static struct address lo = {2, 0x611e, 0x0100007f, {0}}, gateway = {2, 0, 0x0202000a, {0}};

/* Gives an interface an address, if that is not 0, and starts it. */
static int interface(const char *name, unsigned int ip)
{
    struct {
        char name[16];
        union {
            struct address address;
            short flags;
            char room[24];
        };
    } request = {{0}, {{0}}};
    copy(request.name, name);
    long socket = call(SOCKET, 2, 2, 0, 0, 0, 0);
    if (ip) {
        request.address.family = 2;
        request.address.ip = ip;
        if (call(IOCTL, socket, 0x8916 /* SIOCSIFADDR */, (long)&request, 0, 0, 0) < 0)
            return -1;
    }
    request.flags = 1;
    return call(IOCTL, socket, 0x8914 /* SIOCSIFFLAGS */, (long)&request, 0, 0, 0);
}

/* One connection for ever: every number comes, once and in order. */
static int tcp_receive(void *of)
{
    long listening = call(SOCKET, 2, 1, 0, 0, 0, 0);
    call(BIND, listening, (long)&lo, sizeof lo, 0, 0, 0);
    call(LISTEN, listening, 1, 0, 0, 0, 0);
    *(volatile int *)of = 1;
    long stream = call(ACCEPT, listening, 0, 0, 0, 0, 0);
    static u64 numbers[512];
    for (u64 next = 0;;) {
        u64 filled = 0;
        while (filled < sizeof numbers) {
            long got = call(READ, stream, (long)numbers + filled, sizeof numbers - filled, 0, 0, 0);
            if (got <= 0) {
                tcp.errors++;
                say("the stream ends\n");
                for (;;)
                    nap(1000);
            }
            filled += got;
        }
        for (int i = 0; i < 512; i++)
            if (numbers[i] != next++)
                tcp.errors++;
        tcp.done++;
    }
}

static int tcp_send(void *of)
{
    while (!*(volatile int *)of)
        nap(10);
    long stream = call(SOCKET, 2, 1, 0, 0, 0, 0);
    if (call(CONNECT, stream, (long)&lo, sizeof lo, 0, 0, 0) < 0)
        tcp.errors++;
    static u64 numbers[512];
    for (u64 next = 0;;) {
        for (int i = 0; i < 512; i++)
            numbers[i] = next++;
        for (u64 sent = 0; sent < sizeof numbers;) {
            long put = call(WRITE, stream, (long)numbers + sent, sizeof numbers - sent, 0, 0, 0);
            if (put <= 0) {
                tcp.errors++;
                for (;;)
                    nap(1000);
            }
            sent += put;
        }
        nap(1);
    }
}

typedef unsigned short __attribute__((may_alias)) u16;

static u16 checksum(u16 *words, int count)
{
    u64 sum = 0;
    while (count--)
        sum += *words++;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return ~sum;
}

/* Echo requests to QEMU's own gateway, one after the other: each goes through both of the card's rings. */
enum { PING_WORDS = 160 };

static int use_network(void *of)
{
    (void)of;
    while (interface("eth0", 0x0f02000a) < 0)
        nap(10);
    long socket = call(SOCKET, 2, 3, 1, 0, 0, 0);
    long wait[2] = {1, 0};
    call(SETSOCKOPT, socket, 1, 20 /* SO_RCVTIMEO */, (long)wait, sizeof wait, 0);
    static struct {
        unsigned char type, code;
        unsigned short sum, id, number;
        u64 words[PING_WORDS];
    } ping;
    static unsigned char answer[2048] __attribute__((aligned(8)));
    for (u64 number = 0;; number++) {
        ping.type = 8;
        ping.sum = 0;
        ping.number = number;
        for (int i = 0; i < PING_WORDS; i++)
            ping.words[i] = mixed(number) + i;
        ping.sum = checksum((u16 *)&ping, sizeof ping / 2);
        call(SENDTO, socket, (long)&ping, sizeof ping, 0, (long)&gateway, sizeof gateway);
        for (;;) {
            long got = call(RECVFROM, socket, (long)answer, sizeof answer, 0, 0, 0);
            if (got < 0) {
                /* A packet may be lost. */
                net_lost++;
                break;
            }
            /* Behind 20 bytes of IP. An answer that comes late is for an earlier request. */
            u16 of_number = *(u16 *)(answer + 26);
            if (got != 20 + (long)sizeof ping || answer[20] != 0) {
                net.errors++;
                break;
            }
            if (of_number != (u16)number)
                continue;
            for (int i = 0; i < PING_WORDS; i++) {
                u64 word = 0;
                for (int byte = 7; byte >= 0; byte--)
                    word = word << 8 | answer[28 + i * 8 + byte];
                if (word != mixed(number) + i) {
                    net.errors++;
                    break;
                }
            }
            net.done++;
            break;
        }
        nap(5);
    }
}

static void start_load(void)
{
    static char loads[DISK_THREADS + 3][16384] __attribute__((aligned(16)));
    static volatile int listening;
    call(MOUNT, (long)"devtmpfs", (long)"/dev", (long)"devtmpfs", 0, 0, 0);
    load_modules();
    interface("lo", 0);
    thread(tcp_receive, (void *)&listening, loads[0]);
    thread(tcp_send, (void *)&listening, loads[1]);
    thread(use_network, 0, loads[2]);
    for (u64 i = 0; i < DISK_THREADS; i++)
        thread(use_disk, (void *)i, loads[3 + i]);
}

static char *tally(char *at, const char *name, struct tally *of)
{
    at = number(copy(at, name), of->done);
    return number(copy(at, " "), of->errors);
}

static void say_load(void)
{
    char line[160], *at = tally(line, "load disk ", &disk);
    at = tally(tally(at, " tcp ", &tcp), " net ", &net);
    at = number(copy(at, " lost "), net_lost);
    *copy(at, "\n") = 0;
    say(line);
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
    u64 load = asked(environment, "load", 0);
    if (load)
        start_load();
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
        if (load)
            say_load();
    }
}

__attribute__((used)) static void begin(u64 *stack) { run(stack); }

__asm__(".globl _start\n_start:\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall begin\n\thlt");
