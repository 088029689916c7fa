/* The mailbox word two ways, over one device: a plain write, which the receiver finds by loading its own memory, and a
 * write with immediate data, which it finds in a completion queue and for which it must have posted a receive request.
 * Two queue pairs of one process, connected to each other, so that one clock sees both ends.
 *
 *   word DEVICE GID_INDEX ROUNDS
 *
 * Prints a line a round and way: `word <way> <ns from posting until it is found> <ns of a look that finds nothing>
 * <ns to make ready for the next>`. */
#include <infiniband/verbs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { WORDS = 64, LOOKS = 20000, DEPTH = 16 };

#define CHECK(what)                                                                                                    \
    do {                                                                                                               \
        if (!(what)) {                                                                                                 \
            perror(#what);                                                                                             \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e9 + time.tv_nsec;
}

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static struct ibv_qp *queue_pair(struct ibv_pd *pd, struct ibv_cq *sent, struct ibv_cq *received) {
    struct ibv_qp_init_attr wish = {
        .send_cq = sent,
        .recv_cq = received,
        .qp_type = IBV_QPT_RC,
        .cap = {.max_send_wr = DEPTH, .max_recv_wr = DEPTH, .max_send_sge = 1, .max_recv_sge = 1, .max_inline_data = 8},
    };
    struct ibv_qp *pair = ibv_create_qp(pd, &wish);
    CHECK(pair);
    return pair;
}

static void connect_to(struct ibv_qp *pair, struct ibv_qp *peer, union ibv_gid gid, int gid_index, enum ibv_mtu mtu) {
    struct ibv_qp_attr attr = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qp_access_flags = IBV_ACCESS_REMOTE_WRITE};
    CHECK(!ibv_modify_qp(pair, &attr, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
    attr = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTR,
        .path_mtu = mtu,
        .dest_qp_num = peer->qp_num,
        .max_dest_rd_atomic = 1,
        .min_rnr_timer = 12,
        .ah_attr = {.is_global = 1, .port_num = 1, .grh = {.dgid = gid, .sgid_index = gid_index, .hop_limit = 1}},
    };
    CHECK(!ibv_modify_qp(pair, &attr,
                         IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
                             IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
    attr = (struct ibv_qp_attr){
        .qp_state = IBV_QPS_RTS, .timeout = 14, .retry_cnt = 6, .rnr_retry = 6, .max_rd_atomic = 1};
    CHECK(!ibv_modify_qp(pair, &attr,
                         IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
                             IBV_QP_MAX_QP_RD_ATOMIC));
}

int main(int argc, char **argv) {
    CHECK(argc == 4);
    const int gid_index = atoi(argv[2]), rounds = atoi(argv[3]);
    struct ibv_device **devices = ibv_get_device_list(NULL), **each = devices;
    CHECK(devices);
    while (*each && strcmp(ibv_get_device_name(*each), argv[1])) each++;
    CHECK(*each);
    struct ibv_context *context = ibv_open_device(*each);
    CHECK(context);
    struct ibv_port_attr port;
    union ibv_gid gid;
    CHECK(!ibv_query_port(context, 1, &port) && !ibv_query_gid(context, 1, gid_index, &gid));
    struct ibv_pd *pd = ibv_alloc_pd(context);
    CHECK(pd);
    struct ibv_cq *sent = ibv_create_cq(context, DEPTH, NULL, NULL, 0);
    struct ibv_cq *received = ibv_create_cq(context, DEPTH, NULL, NULL, 0);
    CHECK(sent && received);
    struct ibv_qp *sender = queue_pair(pd, sent, sent), *receiver = queue_pair(pd, received, received);
    connect_to(sender, receiver, gid, gid_index, port.active_mtu);
    connect_to(receiver, sender, gid, gid_index, port.active_mtu);

    static _Alignas(64) volatile uint64_t mailbox;
    struct ibv_mr *region =
        ibv_reg_mr(pd, (void *)&mailbox, sizeof mailbox, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE);
    CHECK(region);

    uint64_t word = 0;
    for (int round = 0; round < rounds; round++) {
        for (int immediate = 0; immediate < 2; immediate++) {
            struct ibv_wc done;
            double until_found[WORDS], to_make_ready = 0;
            for (int i = 0; i < WORDS; i++) {
                if (immediate) {
                    struct ibv_recv_wr wish = {0}, *refused;
                    const double start = now();
                    CHECK(!ibv_post_recv(receiver, &wish, &refused));
                    to_make_ready += now() - start;
                }
                word++;
                struct ibv_sge piece = {.addr = (uintptr_t)&word, .length = sizeof word};
                struct ibv_send_wr write = {
                    .sg_list = &piece,
                    .num_sge = 1,
                    .opcode = immediate ? IBV_WR_RDMA_WRITE_WITH_IMM : IBV_WR_RDMA_WRITE,
                    .send_flags = IBV_SEND_INLINE | IBV_SEND_SIGNALED,
                    .wr.rdma = {.remote_addr = (uintptr_t)&mailbox, .rkey = region->rkey},
                }, *refused;
                const double start = now();
                CHECK(!ibv_post_send(sender, &write, &refused));
                if (immediate) {
                    int found;
                    while (!(found = ibv_poll_cq(received, 1, &done))) {}
                    CHECK(found == 1 && done.status == IBV_WC_SUCCESS && done.opcode == IBV_WC_RECV_RDMA_WITH_IMM);
                } else {
                    while (__atomic_load_n(&mailbox, __ATOMIC_ACQUIRE) != word) {}
                }
                until_found[i] = now() - start;
                CHECK(mailbox == word);
                int acknowledged;
                while (!(acknowledged = ibv_poll_cq(sent, 1, &done))) {}
                CHECK(acknowledged == 1 && done.status == IBV_WC_SUCCESS);
            }
            const double start = now();
            for (int i = 0; i < LOOKS; i++) {
                if (immediate) {
                    CHECK(!ibv_poll_cq(received, 1, &done));
                } else {
                    CHECK(__atomic_load_n(&mailbox, __ATOMIC_ACQUIRE) == word);
                }
            }
            const double look = (now() - start) / LOOKS;
            qsort(until_found, WORDS, sizeof *until_found, by_size);
            printf("word %s %.0f %.1f %.0f\n", immediate ? "immediate" : "write", until_found[WORDS / 2], look,
                   to_make_ready / WORDS);
        }
    }
    return 0;
}
